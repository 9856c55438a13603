package xenaccess

// SetSymbolPlaces has files of kernels looked for elsewhere, until the returned
// function is called.
func SetSymbolPlaces(places ...string) (restore func()) {
	was := symbolPlaces
	symbolPlaces = places
	return func() { symbolPlaces = was }
}

// SymbolFiles returns the files that may have the symbols of a release.
func SymbolFiles(release string) []string { return symbolFiles("", release) }
