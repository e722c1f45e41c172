// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func firstOf(cores unix.CPUSet) (core int) {
	for !cores.IsSet(core) {
		core++
	}
	return core
}

func TestAStintKeepsToItsCoresWhateverThreadTheGoroutineComesTo(t *testing.T) {
	var home, core unix.CPUSet
	require.NoError(t, unix.SchedGetaffinity(0, &home))
	core.Set(firstOf(home))
	stop := make(chan struct{})
	var others sync.WaitGroup
	for range 4 { // they take over threads that are given way
		others.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					runtime.Gosched()
				}
			}
		})
	}
	done, threads := make(chan struct{}), map[int]bool{}
	go func() {
		defer close(done)
		var s Stint
		s.Keep(&core, &home)
		defer s.Leave()
		for begin := time.Now(); len(threads) < 2 && time.Since(begin) < 10*time.Second; {
			s.begin = time.Time{} // long ago
			s.GiveWay()
			var now unix.CPUSet
			if !assert.NoError(t, unix.SchedGetaffinity(0, &now)) || !assert.Equal(t, core, now) {
				return
			}
			threads[unix.Gettid()] = true
		}
	}()
	<-done
	close(stop)
	others.Wait()
	require.Greater(t, len(threads), 1, "the goroutine has always been on one thread, which shows nothing")
	for thread := range threads {
		var now unix.CPUSet
		if err := unix.SchedGetaffinity(thread, &now); err != unix.ESRCH {
			require.NoError(t, err)
			require.Equal(t, home, now, "thread %d", thread)
		}
	}
}
