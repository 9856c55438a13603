package console

import (
	"bufio"
	"errors"
	"io"
	"os"
	"strings"
	"time"
)

// Serve is the guest's side: it has each command that r brings carried out, and says what
// comes of it, until r is closed. A command has at least one word.
func Serve(r io.Reader, say func(format string, args ...any), command func(words []string) (reply string, err error)) {
	in := bufio.NewReader(r)
	for {
		line, err := in.ReadString('\n')
		if errors.Is(err, io.ErrClosedPipe) || errors.Is(err, os.ErrClosed) {
			return
		}
		if err != nil { // a console comes back
			time.Sleep(100 * time.Millisecond)
			continue
		}
		tag := ""
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "@") {
			tag, line, _ = strings.Cut(line, " ")
			tag += " "
		}
		words := strings.Fields(line)
		switch {
		case len(words) == 0 && tag == "":
			continue
		case len(words) == 0:
			say("%sERR empty command", tag)
			continue
		}
		reply, err := command(words)
		if err != nil {
			say("%sERR %s", tag, strings.ReplaceAll(err.Error(), "\n", " "))
		} else {
			say("%sDONE %s", tag, reply)
		}
	}
}
