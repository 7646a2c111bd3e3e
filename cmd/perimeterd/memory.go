package main

import (
	"log/slog"

	"github.com/KimMachineGun/automemlimit/memlimit"
)

// memoryShare is how much of the control group's memory, or else the machine's, the heap may fill before it is collected
// harder: the rest is the kernel's, which holds buffers for every connection.
const memoryShare = 0.75

// limitMemory makes the garbage collector heed MemoryMax of the unit. WireGuard's pools know no bound of their own. GOMEMLIMIT
// in the environment comes first.
func limitMemory(log *slog.Logger) {
	limit, err := memlimit.Set(memlimit.WithRatio(memoryShare), memlimit.WithProvider(memlimit.ApplyFallback(memlimit.FromCgroup, memlimit.FromSystem)))
	if err != nil {
		log.Warn("the memory limit is not known: the heap grows as it likes", "err", err)
		return
	}
	log.Debug("memory limit", "bytes", limit)
}
