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

// SameText asks the guest to compare its kernel's text with the copy that textkeep
// made. ask sends a command and returns the answer and the lines before it. Jump
// labels and static calls that the kernel itself has switched may differ, and are
// returned: on a busy host, for example, a guest stops trusting its clock. During
// such a switch the text is in neither state, so SameText asks again for some
// seconds.
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
