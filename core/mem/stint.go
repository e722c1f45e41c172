// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"runtime"
	"time"
)

// longestStint is less than the 10 ms after which Go's runtime looks at a goroutine that has not been scheduled anew, by the length
// of one call.
const longestStint = 8 * time.Millisecond

// Stint is for a goroutine that makes many long system calls, one after the other, without ever waiting for Go. When it has not been
// scheduled for 10 ms, Go's monitor takes the processor away from each of its calls, and for that wakes every 20 us, for as long as it
// finds such a goroutine: on cores that have copies to make this costs 5 to 15% of them (runtime.retake, Go 1.26). A goroutine that gives way
// once in a while is left alone. To give way wakes a thread, and some six where the goroutine is locked to its own.
// The zero Stint is ready for use, by one goroutine at a time.
type Stint struct {
	begin time.Time
}

// Begin says that the goroutine has just been scheduled, or has not made long calls yet.
func (s *Stint) Begin() { s.begin = time.Now() }

// IsLong reports that it is time to give way, after which a new stint begins.
func (s *Stint) IsLong() bool { return time.Since(s.begin) > longestStint }

// GiveWay lets other goroutines run where the stint has been long.
func (s *Stint) GiveWay() {
	if s.IsLong() {
		runtime.Gosched()
		s.Begin()
	}
}
