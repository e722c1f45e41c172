// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/cache"
	"github.com/llm-datadist-open/llm-datadist/core/link"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/testkit/device"
)

// Caches on a device that the process itself can't touch: a load or a store there ends this test binary, a system call answers EFAULT. The
// suite runs over such devices too.

func onHost(d cache.Desc) cache.Desc {
	d.Placement = cache.Host
	return d
}

// errBroken is a device's failure.
var errBroken = errors.New("the device is on fire")

// touching is a hook for the copies that touch a cache's first tensor.
func touching(c *memory, hook func() error) device.Hook {
	has := inside(c.addrs[0], c.tensorBytes())
	return func(moves []mem.Move, _, _ mem.Backing) error {
		for _, m := range moves {
			if has(mem.Span{Addr: m.Dst, Bytes: m.Bytes}) || has(mem.Span{Addr: m.Src, Bytes: m.Bytes}) {
				return hook()
			}
		}
		return nil
	}
}

func TestPullsBetweenAllPlacements(t *testing.T) {
	over(t, []way{betweenDevices, fromDevice, toDevice, deviceBack}, func(w *world) {
		owner, puller := w.pair(func(o *Options) { o.HostPool = poolOf(64 << 20) })
		for seed, c := range []struct{ src, dst func(cache.Desc) cache.Desc }{
			{onHost, onHost}, {onHost, asItIs}, {asItIs, onHost}, {asItIs, asItIs},
		} {
			desc := rows(3, 1, 700_001)
			src, dst := owner.allocate(c.src(desc), two[0]).fill(uint64(seed)), puller.register(c.dst(desc)).fill(99)
			want := src.content()
			require.NoError(w.t, puller.pull(owner, normal(7), dst, all()))
			dst.requireContent(want)
			src.remove()
		}
	})
}

func asItIs(d cache.Desc) cache.Desc { return d }

func TestAChunkIsCopiedFromItsDeviceOnce(t *testing.T) {
	over(t, []way{fromDevice}, func(w *world) {
		owner, puller := w.pair()
		const chunks = 8
		src, dst := owner.register(rows(1, 1, chunks<<20), two[0]).fill(1), puller.register(rows(1, 1, chunks<<20))
		require.NoError(w.t, puller.pull(owner, normal(7), dst, all()))
		dst.requireContent(src.content())
		require.EqualValues(w.t, chunks, owner.device.Copies())
	})
}

// A failure of one side's device ends the pull that it belongs to, and no other on its connection.
func TestADeviceThatFailsEndsThatPullAlone(t *testing.T) {
	over(t, []way{betweenDevices, deviceBubble}, func(w *world) {
		owner, puller := w.pair(func(o *Options) { o.TCPConnections = 1 })
		const size = 8 << 20
		doomed, kept := owner.register(rows(1, 1, size), two[0]).fill(1), owner.register(rows(1, 1, size), two[1]).fill(2)
		to, other := puller.register(rows(1, 1, size)), puller.register(rows(1, 1, size))
		if w.way.fabric {
			w.slow(puller, owner, 32<<20)
		}
		for where, c := range map[string]*memory{"from the owner's memory": doomed, "into the destination": to} {
			var copies atomic.Int64
			c.n.device.Interpose(touching(c, func() error {
				if copies.Add(1) == 3 {
					return errBroken
				}
				return nil
			}))
			other.fill(3)
			lasting := begin(func() error { return puller.pull(owner, normal(8), other, all()) })
			e := requireCode(w.t, status.Failed, puller.pull(owner, normal(7), to, all()))
			require.Equal(w.t, status.StageTransfer, e.Stage)
			require.Contains(w.t, e.Cause, where)
			require.Contains(w.t, e.Cause, errBroken.Error())
			require.NoError(w.t, lasting.wait())
			other.requireContent(kept.content())
			c.n.device.Interpose(nil)
			require.NoError(w.t, puller.pull(owner, normal(7), to, all()), "the link is whole")
			to.requireContent(doomed.content())
		}
	})
}

// stalled is a copy that its device is in the middle of.
type stalled struct{ begun, proceed chan struct{} }

// stall has the next copy that touches a cache begin and wait.
func (c *memory) stall() stalled {
	s := stalled{make(chan struct{}), make(chan struct{})}
	var once atomic.Bool
	c.n.device.Interpose(touching(c, func() error {
		if !once.Swap(true) {
			close(s.begun)
			<-s.proceed
		}
		return nil
	}))
	return s
}

// await waits until the copy is under way, of which the call is not to see the end before.
func (s stalled) await(t *testing.T, call *running) {
	t.Helper()
	select {
	case <-s.begun:
	case <-call.done:
		require.Fail(t, "it ended before its copy", "%v", call.err)
	}
}

// What has been handed to a device can't be taken back: a pull that is cancelled ends when the copy has, and never while it writes.
func TestACancelledPullWaitsForTheCopyUnderWay(t *testing.T) {
	over(t, []way{deviceBubble}, func(w *world) {
		owner, puller := w.pair()
		const size = 8 << 20
		src := owner.register(rows(1, 1, size), two[0]).fill(1)
		dst := puller.register(rows(1, 1, size))
		copying := dst.stall()
		ctx, cancel := context.WithCancel(context.Background())
		pull := begin(func() error { return puller.pullWithin(ctx, owner, normal(7), dst, all()) })
		copying.await(w.t, pull)
		cancel()
		synctest.Wait()
		require.False(w.t, pull.ended(), "the device still writes")
		close(copying.proceed)
		requireCode(w.t, status.Failed, pull.wait())
		dst.fill(5)
		before := dst.content()
		w.pass(time.Minute)
		dst.requireContent(before) // nothing of the pull is in flight any more
		require.NoError(w.t, puller.pull(owner, normal(7), dst, all()))
		dst.requireContent(src.content())
	})
}

// A cache is its application's again when the device no longer reads it, and what was not read in time never counts.
func TestUnregisterWaitsForTheCopyUnderWay(t *testing.T) {
	over(t, []way{betweenDevices}, func(w *world) {
		owner, puller := w.pair()
		const size = 8 << 20
		src := owner.register(rows(1, 1, size), two[0]).fill(1)
		dst := puller.register(rows(1, 1, size))
		copying := src.stall()
		pull := begin(func() error { return puller.pull(owner, normal(7), dst, all()) })
		copying.await(w.t, pull)
		removing := begin(func() error { src.remove(); return nil })
		w.eventually(func() bool { return owner.Stats().Retiring == 1 }, "withdrawn")
		require.False(w.t, removing.ended(), "the device still reads")
		close(copying.proceed)
		require.NoError(w.t, removing.wait())
		requireCode(w.t, status.CacheNotExist, pull.wait())
	})
}

func TestADestinationThatIsUnregisteredEndsThePushIntoIt(t *testing.T) {
	over(t, []way{betweenDevices}, func(w *world) {
		receiver, pusher := w.pair(oneSided)
		const size = 8 << 20
		src, dst := pusher.register(rows(2, 1, size)).fill(1), receiver.register(rows(2, 1, size))
		copying := dst.stall()
		push := begin(func() error { return pusher.push(receiver, src, toKey(byID(dst, 0))) })
		copying.await(w.t, push)
		removing := begin(func() error { dst.remove(); return nil })
		w.eventually(func() bool { return receiver.Stats().Retiring == 1 }, "withdrawn")
		require.False(w.t, removing.ended(), "the device still writes")
		close(copying.proceed)
		require.NoError(w.t, removing.wait())
		requireCode(w.t, status.CacheNotExist, push.wait())
	})
}

func TestAPushToAddressesOnADeviceAndBesideItIsRefused(t *testing.T) {
	over(t, []way{fromDevice}, func(w *world) {
		receiver, pusher := w.pair(oneSided)
		src := pusher.register(rows(2, 1, 100)).fill(1)
		onIt, beside := receiver.register(rows(1, 1, 100)).fill(2), receiver.register(onHost(rows(1, 1, 100))).fill(3)
		was := [][][]byte{onIt.content(), beside.content()}
		e := requireCode(w.t, status.ParamInvalid, pusher.push(receiver, src, PushCall{
			Addrs: []uint64{uint64(onIt.addrs[0]), uint64(beside.addrs[0])}, Plan: all(), TensorsPerLayer: 1,
		}))
		require.Contains(w.t, e.Cause, "partly on a device")
		require.True(w.t, onIt.equals(was[0]) && beside.equals(was[1]))
		require.Zero(w.t, receiver.Stats().Uses)
	})
}

func TestLocalCopiesThatADeviceFails(t *testing.T) {
	over(t, []way{onDevice}, func(w *world) {
		n := w.node("alone", 1)
		a, b := n.register(blocks(1, 4, 100)).fill(1), n.register(onHost(blocks(1, 4, 100))).fill(2)
		n.device.Interpose(func([]mem.Move, mem.Backing, mem.Backing) error { return errBroken })
		for _, err := range []error{
			n.CopyBlocks(a.id, []uint64{0, 1}),
			n.CopyCache(CopyCall{Dst: b.id, Src: a.id, Size: -1}),
			n.CopyCache(CopyCall{Dst: a.id, Src: b.id, Size: -1}),
			n.SwapBlocks(b.addrs, a.addrs, cache.Host, cache.Device, 100, []uint64{0, 0}),
			n.SwapBlocks(a.addrs, b.addrs, cache.Device, cache.Host, 100, []uint64{0, 0}),
		} {
			e := requireCode(w.t, status.Failed, err)
			require.Equal(w.t, status.StageTransfer, e.Stage)
			require.ErrorIs(w.t, err, errBroken)
		}
		n.device.Interpose(nil)
		nowhere := []uintptr{1 << 12}
		requireCode(w.t, status.ParamInvalid, n.SwapBlocks(nowhere, a.addrs, cache.Host, cache.Device, 100, []uint64{0, 0}))
		requireCode(w.t, status.ParamInvalid, n.SwapBlocks(a.addrs, nowhere, cache.Device, cache.Host, 100, []uint64{0, 0}))
		require.Zero(w.t, n.Stats().Uses)
	})
}

func TestAnEngineOnADeviceDoesNotOfferSHM(t *testing.T) {
	over(t, []way{fromDevice}, func(w *world) {
		owner, puller := w.pair(func(o *Options) { o.Transport = "auto" })
		require.Contains(w.t, puller.Explain(1), "transport: tcp")
		src, dst := owner.register(rows(1, 1, 100), two[0]).fill(1), puller.register(rows(1, 1, 100))
		require.NoError(w.t, puller.pull(owner, normal(7), dst, all()))
		dst.requireContent(src.content())
		require.Condition(w.t, func() bool {
			for _, e := range owner.told() {
				if e.Level == link.Warning && e.Cause != nil {
					return true
				}
			}
			return false
		}, "the log says so")
		_, err := New(9, Options{Transport: "shm"}, Parts{Device: device.New(), Network: TCP()})
		e := requireCode(w.t, status.Failed, err)
		require.Contains(w.t, e.Cause, "the device fake")
	})
}
