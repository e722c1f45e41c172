// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"context"
	"math"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Measured says how fast this machine is at what copies are decided by.
type Measured struct {
	// Plain and Streaming are what one thread copies from memory to memory in a second, in bytes, by either kind of store. Streaming is 0
	// where the machine has none.
	Plain, Streaming uint64
	// Wake is how long a parked helper takes until it works.
	Wake time.Duration
}

const (
	// calibrateBytes is copied at a time: enough to fill a second-level cache with what it reads and writes, and done in 0.5 ms.
	calibrateBytes = 2 << 20
	// calibrateScratch is where cold bytes come from, which stays in the cache meanwhile.
	calibrateScratch = 64 << 10
	// calibrateRounds is how often everything is measured. The best of each counts, because whatever else a machine does only makes it
	// slower. A helper has slept for some 2 ms when it is woken, so that this is no wake of one who is about to fall asleep.
	calibrateRounds = 5
	// calibrateTime ends the measurement early on a machine that is slow or busy, after the second round.
	calibrateTime = 10 * time.Millisecond
	// lateWake is where waiting for a helper ends.
	lateWake = time.Millisecond

	// What stands for what could not be measured: a slow machine's figures.
	assumedPlain = 2 << 30
	assumedWake  = 100 * time.Microsecond

	// payFactor is how many wakes of a helper a copy takes on one thread before the helper pays off. The caller needs up to half of a
	// wake itself to call the helper, so that a copy of three wakes then takes three quarters of that: 1.5 + (1 + 0.5) / 2 wakes.
	payFactor = 3
	// leastPays and mostPays bound what comes out of it, whatever was measured: below 256 KiB (some 40 us on one thread) calling and
	// waiting are never worth it, and above 4 MiB (some 0.5 ms) always.
	leastPays = 256 << 10
	mostPays  = 4 << 20
)

var calibrated struct {
	once     sync.Once
	measured Measured
}

// Calibrate measures the machine, once in a process: some 10 ms, and 4 MiB of memory that are given back. What can't be measured is
// assumed, slow rather than fast.
func Calibrate() Measured {
	calibrated.once.Do(func() { calibrated.measured = calibrate() })
	return calibrated.measured
}

// prefersStreams says which kind of stores is faster for large copies. A plain copy leaves its last lines to be written back when its time
// has been taken, which flatters it by more than the tenth that is taken off here.
func (m Measured) prefersStreams() bool { return m.Streaming > m.Plain/10*9 }

// pays is the least total for which a helper pays off.
func (m Measured) pays() uint64 {
	bytes := float64(max(m.Plain, m.Streaming)) * m.Wake.Seconds() * payFactor
	return uint64(min(max(bytes, leastPays), mostPays))
}

func calibrate() Measured {
	m := Measured{Plain: assumedPlain, Wake: assumedWake}
	buffer, err := NewBuffer(2*calibrateBytes + calibrateScratch)
	if err != nil {
		return m
	}
	defer func() { _ = buffer.Free() }()
	c := calibration{
		dst: buffer.Addr(), src: buffer.Addr() + calibrateBytes, scratch: buffer.Addr() + 2*calibrateBytes,
		crew: NewCrew(2), plain: math.MaxInt64, streaming: math.MaxInt64, woke: math.MaxInt64,
	}
	defer c.crew.Close()
	runtime.LockOSThread() // its time is measured
	defer runtime.UnlockOSThread()
	c.cool() // its pages come into being
	begin := clock(unix.CLOCK_MONOTONIC)
	for round := range calibrateRounds {
		if round >= 2 && clock(unix.CLOCK_MONOTONIC)-begin > calibrateTime {
			break
		}
		c.round()
	}
	return c.result(m)
}

// calibration is what is measured with, and the best so far.
type calibration struct {
	dst, src, scratch      uintptr
	crew                   *Crew
	plain, streaming, woke time.Duration
}

func (c *calibration) round() {
	c.plain = min(c.plain, c.copy(plainStores{}))
	if haveStreams {
		c.streaming = min(c.streaming, c.copy(streamingStores{}))
	}
	if runtime.GOMAXPROCS(0) > 1 {
		c.woke = min(c.woke, c.wake())
	}
}

func (c *calibration) result(m Measured) Measured {
	m.Plain = perSecond(c.plain)
	if haveStreams {
		m.Streaming = perSecond(c.streaming)
	}
	if c.woke < lateWake {
		m.Wake = c.woke
	}
	return m
}

func perSecond(took time.Duration) uint64 {
	return uint64(calibrateBytes * float64(time.Second) / float64(max(took, 1)))
}

// copy measures a copy of bytes that are in no cache, as those of a peer are, in time of this thread, so that it doesn't matter when
// others take the core away.
func (c *calibration) copy(method Method) time.Duration {
	c.cool()
	begin := clock(unix.CLOCK_THREAD_CPUTIME_ID)
	_ = method.Copy([]Move{{Dst: c.dst, Src: c.src, Bytes: calibrateBytes}}, 0, calibrateBytes) // stores don't fail
	return clock(unix.CLOCK_THREAD_CPUTIME_ID) - begin
}

// cool takes source and destination out of the caches, by streaming stores to them. Where there are none, nothing is compared.
func (c *calibration) cool() {
	method := Method(plainStores{})
	if haveStreams {
		method = streamingStores{}
	}
	for at := c.dst; at < c.scratch; at += calibrateScratch {
		_ = method.Copy([]Move{{Dst: at, Src: c.scratch, Bytes: calibrateScratch}}, 0, calibrateScratch) // stores don't fail
	}
}

// wake measures how long a helper takes until it works. It is lateWake or more where none comes: other threads are busy, or this is a
// synctest bubble, in which alarms go off only when everybody waits.
func (c *calibration) wake() time.Duration {
	var a arrival
	begin := clock(unix.CLOCK_MONOTONIC)
	j := c.crew.open(context.Background(), []Move{{Bytes: 1}}, 1, &a, 1)
	took := clock(unix.CLOCK_MONOTONIC) - begin
	for !a.happened.Load() && took < lateWake {
		pause()
		took = clock(unix.CLOCK_MONOTONIC) - begin
	}
	_ = c.crew.finish(j) // an arrival doesn't fail
	return took
}

// arrival is a Method that copies nothing and tells that somebody has begun.
type arrival struct{ happened atomic.Bool }

func (a *arrival) Copy([]Move, uint64, uint64) error {
	a.happened.Store(true)
	return nil
}

// clock reads a clock of the machine: that of package time stands still in a synctest bubble.
func clock(id int32) time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(id, &t) // these two clocks are always there
	return time.Duration(t.Nano())
}
