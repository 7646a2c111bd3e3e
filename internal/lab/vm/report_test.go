//go:build linux

package main

import (
	"io"
	"strings"
	"testing"
)

func TestOnlyAPassOfEveryTestOnEveryMachineIsSuccess(t *testing.T) {
	const passed = `test-vm kernel 6.1.0
=== RUN   TestDoor
=== RUN   TestDoor/part
--- PASS: TestDoor (1.00s)
    --- PASS: TestDoor/part (0.00s)
test-vm firewall 0
=== RUN   perimeterd check
--- PASS: perimeterd check
test-vm end`
	for said, want := range map[string]string{
		passed: "",
		strings.Replace(passed, "--- PASS: TestDoor (", "--- FAIL: TestDoor (", 1):               "TestDoor: FAIL (1.00s)",
		strings.Replace(passed, "--- PASS: TestDoor (", "--- SKIP: TestDoor (", 1):               "TestDoor: SKIP (1.00s)",
		strings.Replace(passed, "--- PASS: TestDoor (1.00s)", "panic: out of memory", 1):         "TestDoor: no result",
		strings.Replace(passed, "--- PASS: perimeterd check", "--- FAIL: perimeterd check", 1):   "perimeterd check: FAIL",
		strings.Replace(passed, "=== RUN   perimeterd check\n--- PASS: perimeterd check", "", 1): "perimeterd check: did not run",
		strings.Replace(passed, "test-vm firewall 0", "test-vm firewall 2", 1):                   "exit status 2",
		"": "TestDoor: did not run",
	} {
		var reports []*report
		for _, text := range []string{passed, said} {
			r := &report{results: map[string]string{}}
			for line := range strings.Lines(text) {
				r.line(strings.TrimRight(line, "\n"))
			}
			reports = append(reports, r)
		}
		err := summarize(io.Discard, reports)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v, want %q", said, err, want)
		}
	}
}
