package console

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// ErrTextChanged: the guest's kernel text isn't what it was.
var ErrTextChanged = errors.New("the guest's kernel text has changed")

// SameText has the guest compare its kernel's text with what it kept (textkeep). ask
// sends a command and returns the answer and the lines before it. What the kernel itself
// switches over at its jump labels and static calls may differ, and is returned: a busy
// machine's guest finds that its clock isn't to be relied on, for one. In the middle of
// such a change the text is neither, so a guest is asked again for some seconds.
func SameText(ctx context.Context, ask func(ctx context.Context, command string) (reply string, lines []string, err error)) (own []string, err error) {
	for try := 0; ; try++ {
		reply, lines, err := ask(ctx, "textchanges")
		switch {
		case err != nil:
			return nil, err
		case strings.Contains(reply, "other=0 "):
			return lines, nil
		case try == 9:
			return nil, fmt.Errorf("%w:\n%s", ErrTextChanged, strings.Join(lines, "\n"))
		}
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
