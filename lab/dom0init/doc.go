// Command dom0init is the /init of the lab's emulated dom0. It brings up a Xen
// control domain without any distribution around it, runs the one job it was
// given, and reports over the second serial port, where nothing but the lab
// protocol is written: Xen and both kernels log to the first one.
package main
