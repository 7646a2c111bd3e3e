package main

import "os"

// passedSignals: Windows sends Ctrl-C to both of us by itself.
var passedSignals = []os.Signal{os.Interrupt}

func fromTerminal(os.Signal) bool { return true }

func dieLike(state *os.ProcessState) error { return exitStatus(state.ExitCode()) }
