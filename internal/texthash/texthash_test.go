package texthash

import (
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestSum(t *testing.T) {
	// The check values of both polynomials (crc32 and crc32c of RFC 3720).
	assert.Equal(t, "cbf43926e3069283", Sum([]byte("123456789")).String())
	h := new(Hash)
	for _, s := range []string{"12345", "", "6789"} {
		n, err := h.Write([]byte(s))
		assert.NoError(t, err)
		assert.Equal(t, len(s), n)
	}
	assert.Equal(t, Sum([]byte("123456789")), h)
}
