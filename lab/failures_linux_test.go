package main

import (
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestFailures(t *testing.T) {
	const out = `=== RUN   TestLab
=== RUN   TestLab/Handlers
    lab_test.go:41: Xen 4.17.5
    lab_test.go:622: 
        	Error Trace:	lab_test.go:622
        	Error:      	Not equal: 
        	            	expected: 1
        	Test:       	TestLab/Handlers
=== RUN   TestLab/Unserved
    lab_test.go:571: 60 hits
--- FAIL: TestLab (7.39s)
    --- FAIL: TestLab/Handlers (1.10s)
    --- PASS: TestLab/Unserved (1.10s)
FAIL
panic: runtime error

goroutine 1 [running]:
`
	const want = `        	Error Trace:	lab_test.go:622
        	Error:      	Not equal: 
        	            	expected: 1
        	Test:       	TestLab/Handlers
--- FAIL: TestLab (7.39s)
    --- FAIL: TestLab/Handlers (1.10s)
panic: runtime error`
	for _, piece := range []int{1, 7, 4096} { // however it arrives
		var f failures
		for i := 0; i < len(out); i += piece {
			f.write(out[i:min(i+piece, len(out))])
		}
		assert.Equal(t, want, f.String())
	}
}
