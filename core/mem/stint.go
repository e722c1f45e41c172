// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// longestStint is less than the 10 ms after which Go's runtime looks at a goroutine that has not been scheduled anew, by the length
// of one call.
const longestStint = 8 * time.Millisecond

// Stint is for a goroutine that makes many long system calls, one after the other, without ever waiting for Go. When it has not been
// scheduled for 10 ms, Go's monitor takes the processor away from each of its calls, and for that wakes every 20 us, for as long as it
// finds such a goroutine: on cores that have copies to make this costs 5 to 15% of them (runtime.retake, Go 1.26). A goroutine that gives way
// once in a while is left alone. It may also keep to some cores.
// The zero Stint is ready for use, by one goroutine at a time.
type Stint struct {
	begin       time.Time
	thread      int // that is bound to cores; 0: none is
	cores, home *unix.CPUSet
}

// Begin says that the goroutine has just been scheduled, or has not made long calls yet.
func (s *Stint) Begin() { s.begin = time.Now() }

// Keep binds the goroutine to some cores until Leave, after which its thread may use those of home. It keeps both pointers. A system that
// does not allow it costs only speed.
func (s *Stint) Keep(cores, home *unix.CPUSet) {
	s.cores, s.home = cores, home
	runtime.LockOSThread()
	s.bind()
}

func (s *Stint) bind() {
	s.thread = unix.Gettid()
	_ = unix.SchedSetaffinity(s.thread, s.cores)
}

// Leave undoes Keep.
func (s *Stint) Leave() {
	if s.thread != 0 {
		_ = unix.SchedSetaffinity(s.thread, s.home)
		s.thread = 0
		runtime.UnlockOSThread()
	}
}

// GiveWay lets other goroutines run where the stint has been long. A goroutine that is locked to its thread would have another thread
// woken, which wakes this one again, and some more; so one that keeps to cores isn't meanwhile, and hardly ever comes to another thread.
func (s *Stint) GiveWay() {
	if time.Since(s.begin) <= longestStint {
		return
	}
	if s.thread == 0 {
		runtime.Gosched()
	} else {
		runtime.UnlockOSThread()
		runtime.Gosched()
		runtime.LockOSThread()
		if unix.Gettid() != s.thread {
			_ = unix.SchedSetaffinity(s.thread, s.home) // it goes on with other goroutines
			s.bind()
		}
	}
	s.Begin()
}

// Yield lets somebody else have the core for a moment. It is a system call and not Go's, since most who look for something again and again
// are bound to their thread, for which Go's costs two changes of threads.
func Yield() { _, _, _ = unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0) }
