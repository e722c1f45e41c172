// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/testkit"
)

// newCrew makes a crew that calls its helpers for every byte.
func newCrew(t testing.TB, threads int) *Crew {
	c := NewCrew(threads)
	c.pays = 1
	t.Cleanup(c.Close)
	return c
}

// methodFunc is a method for one test.
type methodFunc func(moves []Move, offset, bytes uint64) error

func (f methodFunc) Copy(moves []Move, offset, bytes uint64) error { return f(moves, offset, bytes) }

// nothing copies nothing.
var nothing = methodFunc(func([]Move, uint64, uint64) error { return nil })

// manyCores lets crews of several threads be crews on any machine.
func manyCores(t testing.TB) {
	before := runtime.GOMAXPROCS(8)
	t.Cleanup(func() { runtime.GOMAXPROCS(before) })
}

// theMoves is a list of no real memory.
func theMoves(total uint64) []Move { return []Move{{Bytes: total}} }

func TestACrewMovesEveryByte(t *testing.T) {
	manyCores(t)
	const size = 3<<20 + 77
	src, dst := pages(t, size/page+1), pages(t, size/page+1)
	for _, largest := range []uint64{5000, 100 << 10, 4 << 20} {
		moves, want := shuffled(src, dst, largest, largest)
		for name, method := range methods() {
			for threads := 1; threads <= 8; threads++ {
				clear(dst.Bytes())
				require.NoError(t, newCrew(t, threads).Copy(t.Context(), moves, uint64(len(want)), method))
				require.True(t, bytes.Equal(want, dst.Bytes()[:len(want)]), "%s, %d threads, runs of %d", name, threads, largest)
			}
		}
	}
}

// ledger notes which bytes of a list were asked for.
type ledger struct {
	mu     sync.Mutex
	claims []claimed
}

type claimed struct{ from, bytes uint64 }

func (l *ledger) method(list []Move) Method {
	return methodFunc(func(moves []Move, offset, bytes uint64) error {
		from := offset
		for _, m := range list[:len(list)-len(moves)] {
			from += m.Bytes
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		l.claims = append(l.claims, claimed{from, bytes})
		return nil
	})
}

func TestClaimsCoverTheListOnceAndShrink(t *testing.T) {
	for _, shares := range []uint64{2, 4, 16} {
		for _, total := range []uint64{1, leastClaim - 1, leastClaim, leastClaim + 1, 5<<20 + 3, 100 << 20} {
			j := job{total: total, shares: shares, most: mostCallClaim}
			next, previous := uint64(0), uint64(mostCallClaim)
			for {
				from, bytes := j.claim(j.most)
				if bytes == 0 {
					break
				}
				require.Equal(t, next, from)
				require.LessOrEqual(t, bytes, previous)
				if from+bytes < total {
					require.GreaterOrEqual(t, bytes, uint64(leastClaim))
					require.Zero(t, bytes%leastClaim, "segments of usual sizes are not cut")
				}
				next, previous = from+bytes, bytes
			}
			require.Equal(t, total, next)
			require.LessOrEqual(t, previous, uint64(leastClaim), "the last one is short")
		}
	}
}

func TestEachByteIsCopiedByOneThread(t *testing.T) {
	manyCores(t)
	list := []Move{{Bytes: 700 << 10}, {}, {Bytes: 1}, {Bytes: 9 << 20}, {Bytes: 64 << 10}, {}}
	const total = 700<<10 + 1 + 9<<20 + 64<<10
	for threads := 1; threads <= 8; threads++ {
		c := newCrew(t, threads)
		for range 50 {
			var l ledger
			require.NoError(t, c.Copy(t.Context(), list, total, l.method(list)))
			done := map[uint64]uint64{}
			for _, claim := range l.claims {
				require.LessOrEqual(t, claim.bytes, uint64(mostCallClaim))
				done[claim.from] = claim.bytes
			}
			require.Len(t, done, len(l.claims))
			at := uint64(0)
			for at < total {
				require.NotZero(t, done[at])
				at += done[at]
			}
			require.EqualValues(t, total, at)
		}
	}
}

func TestAListOfManyMovesIsWalkedOnce(t *testing.T) {
	manyCores(t)
	const count, size = 1 << 20, 64 << 10
	list := make([]Move, count)
	for i := range list {
		list[i].Bytes = size
	}
	for threads := 1; threads <= 2; threads++ {
		c := newCrew(t, threads)
		var sum atomic.Uint64
		begin := time.Now()
		require.NoError(t, c.Copy(t.Context(), list, count*size, methodFunc(func(moves []Move, offset, bytes uint64) error {
			if got := uint64(len(list)-len(moves))*size + offset; got%leastClaim != 0 {
				return fmt.Errorf("a claim at %d", got)
			}
			sum.Add(bytes)
			return nil
		})))
		require.EqualValues(t, count*size, sum.Load())
		require.Less(t, time.Since(begin), 5*time.Second, "a walk takes some ms; one for each of the 65,536 claims would take minutes")
	}
}

func TestHelpersWork(t *testing.T) {
	manyCores(t)
	synctest.Test(t, func(t *testing.T) {
		c := newCrew(t, 4)
		var here, most atomic.Int32
		require.NoError(t, c.Copy(t.Context(), theMoves(8*leastClaim), 8*leastClaim, methodFunc(func([]Move, uint64, uint64) error {
			for now := here.Add(1); ; {
				if before := most.Load(); now <= before || most.CompareAndSwap(before, now) {
					break
				}
			}
			time.Sleep(time.Second) // virtual time: until nobody else has anything to do
			here.Add(-1)
			return nil
		})))
		require.EqualValues(t, 4, most.Load())
	})
}

func TestNoHelperIsAskedForLittle(t *testing.T) {
	c := NewCrew(8)
	defer c.Close()
	manyCores(t)
	for total, helpers := range map[uint64]int{0: 0, 1: 0, leastPays - 1: 0, 1 << 40: 7} {
		require.Equal(t, helpers, c.worth(total, plainStores{}), total)
	}
	c.pays = 1 << 20
	for total, helpers := range map[uint64]int{1<<20 - 1: 0, 1 << 20: 1, 3<<20 - 1: 2, 7 << 20: 7, 1 << 40: 7} {
		require.Equal(t, helpers, c.worth(total, plainStores{}), total)
	}
	runtime.GOMAXPROCS(3)
	require.Equal(t, 2, c.worth(1<<40, plainStores{}))
	half := c.pays / systemCallCost
	require.Zero(t, c.worth(half-1, Kernel))
	require.Equal(t, 1, c.worth(half, Kernel), "system calls take longer")
	runtime.GOMAXPROCS(1)
	require.Zero(t, c.worth(1<<40, plainStores{}), "on one core helpers only take turns")
	require.NoError(t, c.Copy(t.Context(), theMoves(1<<40), 1<<40, nothing))
	require.Zero(t, newCrew(t, 0).worth(1<<40, plainStores{}))
}

// The caller is waited for by nobody, and waits for nobody who hasn't joined.
func TestACopyEndsWithoutItsHelpers(t *testing.T) {
	manyCores(t)
	synctest.Test(t, func(t *testing.T) {
		c := newCrew(t, 2)
		begin := time.Now()
		calls := 0 // by this goroutine alone: in a bubble helpers wake when we block
		for range 10 {
			require.NoError(t, c.Copy(t.Context(), theMoves(10), 10, methodFunc(func([]Move, uint64, uint64) error { calls++; return nil })))
		}
		require.Equal(t, 10, calls)
		require.Zero(t, time.Since(begin))
	})
}

// A helper that is asked to join a job which has ended, or is another one by now, leaves it alone.
func TestInvitesEndWithTheirJob(t *testing.T) {
	c := newCrew(t, 2)
	j := c.open(t.Context(), theMoves(1), 1, nothing, 1)
	epoch := j.state.Load() >> jobEpochShift
	require.True(t, j.join(epoch))
	j.leave()
	require.False(t, j.join(epoch+1))
	require.False(t, j.join(epoch-1))
	j.work(new(Stint), 0)
	require.NoError(t, c.finish(j))
	require.False(t, j.join(epoch))
	require.Nil(t, j.ctx)
	require.Nil(t, j.method)
	require.Nil(t, j.moves, "a job that waits for the next copy keeps nothing")
	for range 100 {
		again := c.open(t.Context(), theMoves(1), 1, nothing, 1)
		require.False(t, j == again && j.join(epoch))
		require.NoError(t, c.finish(again))
	}
	j.state.Store((1<<32 - 1) << jobEpochShift)
	c.jobs.Put(j)
	for range 3 { // over the end of the epochs
		require.NoError(t, c.Copy(t.Context(), theMoves(1), 1, nothing))
	}
}

func TestLateHelpersTouchNothing(t *testing.T) {
	manyCores(t)
	for threads := 2; threads <= 8; threads += 3 {
		c := newCrew(t, threads)
		src, dst := pages(t, 1), pages(t, 1)
		var inside atomic.Int32
		var over atomic.Bool
		watched := methodFunc(func(moves []Move, offset, bytes uint64) error {
			inside.Add(1)
			defer inside.Add(-1)
			if over.Load() {
				return errors.New("after the end")
			}
			return plainStores{}.Copy(moves, offset, bytes)
		})
		for i := range 3000 {
			src.Bytes()[i%7], dst.Bytes()[i%7+3] = byte(i), byte(i+1)
			over.Store(false)
			require.NoError(t, c.Copy(t.Context(), []Move{{dst.Addr() + uintptr(i%7+3), src.Addr() + uintptr(i%7), 1}}, 1, watched))
			over.Store(true)
			require.Zero(t, inside.Load())
			require.Equal(t, byte(i), dst.Bytes()[i%7+3])
		}
	}
}

func TestManyCopiesShareACrew(t *testing.T) {
	manyCores(t)
	c := newCrew(t, 4)
	var all sync.WaitGroup
	for g := range uint64(6) {
		const size = 1 << 20
		src, dst := pages(t, size/page), pages(t, size/page)
		moves, want := shuffled(src, dst, 50<<10, g)
		all.Go(func() {
			for i := range 60 {
				for _, n := range []uint64{1, 100, uint64(len(want))} {
					clear(dst.Bytes()[:n])
					if err := c.Copy(context.Background(), moves, n, plainStores{}); err != nil || !bytes.Equal(want[:n], dst.Bytes()[:n]) {
						t.Errorf("copy %d of goroutine %d: %v", i, g, err)
						return
					}
				}
			}
		})
	}
	all.Wait()
}

func TestNothingIsClaimedAfterAFailure(t *testing.T) {
	manyCores(t)
	failure := errors.New("failure")
	for threads := int32(1); threads <= 8; threads++ {
		for bad := int32(1); bad <= 20; bad++ {
			synctest.Test(t, func(t *testing.T) {
				c := newCrew(t, int(threads))
				var calls atomic.Int32
				err := c.Copy(t.Context(), theMoves(1<<40), 1<<40, methodFunc(func([]Move, uint64, uint64) error {
					if calls.Add(1) == bad {
						return failure
					}
					time.Sleep(time.Second) // virtual time: the failure is known when this has passed
					return nil
				}))
				require.Equal(t, failure, err)
				require.Less(t, calls.Load(), bad+threads, "what others had claimed already")
				require.NoError(t, c.Copy(t.Context(), theMoves(1<<30), 1<<30, nothing), "the next copy knows nothing of it")
			})
		}
	}
}

func TestTheFirstErrorWins(t *testing.T) {
	manyCores(t)
	synctest.Test(t, func(t *testing.T) {
		c := newCrew(t, 2)
		var order atomic.Int32
		begin := time.Now()
		err := c.Copy(t.Context(), theMoves(1<<30), 1<<30, methodFunc(func([]Move, uint64, uint64) error {
			n := order.Add(1)
			time.Sleep(time.Duration(n) * time.Second) // virtual time: the second one fails second
			return fmt.Errorf("failure %d", n)
		}))
		require.ErrorContains(t, err, "failure 1")
		require.EqualValues(t, 2, order.Load())
		require.Equal(t, 2*time.Second, time.Since(begin), "the other thread was waited for")
	})
}

// fickle is a context that has ended after some looks at it, and says so differently each time.
type fickle struct {
	context.Context
	left atomic.Int32
}

type lookError int32

func (e lookError) Error() string { return fmt.Sprint("look ", int32(e)) }

func (f *fickle) Err() error {
	if n := f.left.Add(-1); n < 0 {
		return lookError(n)
	}
	return nil
}

func TestAnEndedContextEndsACopy(t *testing.T) {
	manyCores(t)
	for threads := 1; threads <= 8; threads++ {
		c := newCrew(t, threads)
		for looks := range int32(20) {
			ctx := &fickle{Context: t.Context()}
			ctx.left.Store(looks)
			var calls atomic.Int32
			err := c.Copy(ctx, theMoves(1<<40), 1<<40, methodFunc(func(_ []Move, _, bytes uint64) error {
				if bytes > mostCallClaim {
					return errors.New("a large chunk")
				}
				calls.Add(1)
				return nil
			}))
			require.IsType(t, lookError(0), err)
			require.LessOrEqual(t, calls.Load(), looks, "no chunk without a look")
			if threads == 1 {
				require.Equal(t, looks, calls.Load(), "and no look without a chunk, unless another thread has failed meanwhile")
			}
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for _, threads := range []int{1, 2} {
		require.Equal(t, context.Canceled, newCrew(t, threads).Copy(ended, theMoves(5), 5, nil))
		require.NoError(t, newCrew(t, threads).Copy(ended, nil, 0, nil), "nothing is all copied")
	}
}

func TestACallerBlocksForASlowHelper(t *testing.T) {
	manyCores(t)
	synctest.Test(t, func(t *testing.T) {
		c := newCrew(t, 2)
		var calls atomic.Int32
		begin := time.Now()
		require.NoError(t, c.Copy(t.Context(), theMoves(2*leastClaim), 2*leastClaim, methodFunc(func([]Move, uint64, uint64) error {
			if calls.Add(1) == 1 {
				time.Sleep(time.Second) // virtual time: the helper comes meanwhile
			} else {
				time.Sleep(time.Hour) // virtual time: it is far slower than anybody would look for it
			}
			return nil
		})))
		require.Equal(t, time.Hour, time.Since(begin).Truncate(time.Minute))
	})
}

// A bubble doesn't end while a goroutine of it is there.
func TestCloseLeavesNoGoroutine(t *testing.T) {
	manyCores(t)
	for threads := range 5 {
		synctest.Test(t, func(*testing.T) {
			c := NewCrew(threads)
			c.pays = 1
			for total := range uint64(threads) {
				_ = c.Copy(context.Background(), theMoves(total), total, nothing)
			}
			c.Close()
		})
		c := NewCrew(threads)
		c.pays = 1
		_ = c.Copy(context.Background(), theMoves(1<<30), 1<<30, nothing)
		c.Close()
		before, _ := c.jobs.Get().(*job)
		require.True(t, before == nil || !before.alarm.Stop(), "no alarm is set")
	}
}

func TestCopiesAllocateNothing(t *testing.T) {
	manyCores(t)
	if testkit.Raced {
		t.Skip("the race detector makes sync.Pool forget")
	}
	const size = 1 << 20
	src, dst := pages(t, size/page), pages(t, size/page)
	for name, method := range map[string]Method{"plain": plainStores{}, "streaming": Stores(1 << 30), "kernel": Kernel} {
		for threads := 1; threads <= 3; threads++ {
			c := newCrew(t, threads)
			moves := []Move{{dst.Addr(), src.Addr(), size / 2}, {dst.Addr() + size/2, src.Addr() + size/2, size / 2}}
			ctx := t.Context()
			require.Zero(t, testing.AllocsPerRun(50, func() { _ = c.Copy(ctx, moves, size, method) }), "%s, %d threads", name, threads)
		}
	}
}

func TestWhatIsMeasuredIsSane(t *testing.T) {
	m := Calibrate()
	require.Equal(t, m, Calibrate(), "measured once")
	require.Greater(t, m.Plain, uint64(100<<20))
	require.Less(t, m.Plain, uint64(1<<40))
	require.Equal(t, haveStreams, m.Streaming > 0)
	require.Positive(t, m.Wake)
	require.LessOrEqual(t, m.Wake, lateWake)
}

func TestMeasuringEndsSoonInABubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := calibrate()
		require.Equal(t, assumedWake, m.Wake, "in a bubble nobody comes")
		require.Greater(t, m.Plain, uint64(100<<20))
	})
}

func TestNoMeasurementMakesHelpersSilly(t *testing.T) {
	for _, c := range []struct {
		m    Measured
		pays uint64
	}{
		{Measured{}, leastPays},
		{Measured{Plain: 1}, leastPays},
		{Measured{Plain: 1 << 62, Streaming: 1 << 62, Wake: time.Hour}, mostPays},
		{Measured{Plain: 8 << 30, Wake: time.Nanosecond}, leastPays},
		{Measured{Plain: 5e9, Streaming: 1e10, Wake: 30 * time.Microsecond}, 900_000},
	} {
		require.Equal(t, c.pays, c.m.pays())
	}
	require.False(t, Measured{Plain: 5}.prefersStreams(), "there are none")
	require.False(t, Measured{Plain: 100, Streaming: 90}.prefersStreams())
	require.True(t, Measured{Plain: 100, Streaming: 91}.prefersStreams())
}

func TestAHelperLeavesTheCoreOfItsCaller(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before, cores, home, now unix.CPUSet
	require.NoError(t, unix.SchedGetaffinity(0, &before))
	if before.Count() < 2 {
		t.Skip("there is one core alone")
	}
	for range 20 {
		j := &job{core: currentCore()}
		require.True(t, before.IsSet(j.core))
		var stint Stint
		for ; stint.thread == 0; j.core = currentCore() { // the kernel may have moved us
			j.part(&stint, &cores, &home)
		}
		require.Equal(t, before, home)
		require.Equal(t, before.Count()-1, cores.Count())
		require.True(t, cores.IsSet(currentCore()), "it has left")
		require.NoError(t, unix.SchedGetaffinity(0, &now))
		require.Equal(t, cores, now)
		stint.Leave()
		require.NoError(t, unix.SchedGetaffinity(0, &now))
		require.Equal(t, before, now)
	}
	var stint Stint
	(&job{core: -1}).part(&stint, &cores, &home)
	require.Zero(t, stint.thread, "a small copy moves nobody")
	alone := before
	for alone.Count() > 1 {
		alone.Clear(firstOf(alone))
	}
	require.NoError(t, unix.SchedSetaffinity(0, &alone))
	defer func() { require.NoError(t, unix.SchedSetaffinity(0, &before)) }()
	(&job{core: firstOf(alone)}).part(&stint, &cores, &home)
	require.Zero(t, stint.thread, "there is nowhere to go")
}

// A caller that no helper has joined yet claims little and lets others run.
func TestTheCallerClaimsLittleUntilAHelperHasCome(t *testing.T) {
	const total = 64 << 20
	for _, c := range []struct {
		helped bool
		yields int
		first  []uint64
	}{
		{false, 3, []uint64{partClaim, partClaim, partClaim, mostCallClaim}},
		{true, 3, []uint64{partClaim, mostCallClaim, mostCallClaim}},
		{false, 0, []uint64{mostCallClaim, mostCallClaim}},
	} {
		var claims []uint64
		j := &job{ctx: t.Context(), moves: theMoves(total), total: total, shares: 4, most: mostCallClaim}
		j.method = methodFunc(func(_ []Move, _, bytes uint64) error {
			claims = append(claims, bytes)
			return nil
		})
		if c.helped {
			j.state.Add(1)
		}
		j.work(new(Stint), c.yields)
		require.NoError(t, j.err)
		require.Equal(t, c.first, claims[:len(c.first)])
	}
}
