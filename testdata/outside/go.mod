// A module of somebody else's, that uses vmprobes: TestOutside builds it.
module example.com/outside

go 1.25

require github.com/vmprobes/vmprobes v0.0.0

replace github.com/vmprobes/vmprobes => ../..
