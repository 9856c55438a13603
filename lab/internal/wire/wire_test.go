package wire

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func collect(pieces ...string) (messages []Message, noise []string) {
	p := Parser{
		Message: func(m Message) { messages = append(messages, m) },
		Noise:   func(line string) { noise = append(noise, line) },
	}
	for _, piece := range pieces {
		_, _ = p.Write([]byte(piece))
	}
	return messages, noise
}

func TestRoundTrip(t *testing.T) {
	sent := []Message{
		{Kind: Status, Data: "booting"},
		{Kind: Start},
		{Kind: Stdout, Data: "plain\nand \"quoted\" \\n\ttext\r\n"},
		{Kind: Stderr, Data: "\x00\xff\x01LAB exit \u00e9"},
		{Kind: File, Name: "a b.log", Data: "x"},
		{Kind: Exit, Code: -3},
	}
	var b bytes.Buffer
	w := NewWriter(&b)
	for _, m := range sent {
		require.NoError(t, w.Send(m))
	}
	for _, c := range b.Bytes() {
		require.True(t, c < 0x7f, "only ASCII goes over the line")
	}

	got, noise := collect(b.String())
	assert.Equal(t, sent, got)
	assert.Empty(t, noise)

	// The same, one byte at a time and with the line ends of a terminal.
	got, _ = collect(strings.Split(strings.ReplaceAll(b.String(), "\n", "\r\n"), "")...)
	assert.Equal(t, sent, got)
}

func TestLongDataIsCut(t *testing.T) {
	data := strings.Repeat("0123456789abcde\xc3", 1000)
	var b bytes.Buffer
	n, err := NewWriter(&b).Stream(Stdout, "").Write([]byte(data))
	require.NoError(t, err)
	assert.Equal(t, len(data), n)
	messages, noise := collect(b.String())
	assert.Empty(t, noise)
	assert.Greater(t, len(messages), 10)
	var all strings.Builder
	for _, m := range messages {
		all.WriteString(m.Data)
	}
	assert.Equal(t, data, all.String())
}

func TestNoise(t *testing.T) {
	messages, noise := collect("[    0.1] booting\n", "\x01LAB out \"\" \"unfinis\n", "\x01LAB exit \"\" \"\" 0x\n", "garbage\x01LAB exit \"\" \"\" 4\n")
	assert.Equal(t, []Message{{Kind: Exit, Code: 4}}, messages)
	assert.Len(t, noise, 3)
}

func TestEndlessLine(t *testing.T) {
	_, noise := collect(strings.Repeat("x", maxLine+1))
	assert.Len(t, noise, 1)
}

func FuzzParser(f *testing.F) {
	f.Add("\x01LAB out \"\" \"a\" 0\n")
	f.Fuzz(func(t *testing.T, s string) {
		messages, _ := collect(s)
		for _, m := range messages {
			_ = fmt.Sprint(m)
		}
	})
}
