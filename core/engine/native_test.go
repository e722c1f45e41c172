// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/link"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/testkit/library"
)

// What the transport cann promises beside what the suite asks of every transport.

func overTheLibrary(t *testing.T, run func(w *world)) { over(t, []way{overLibrary}, run) }

// onCall is a hook for the calls of one name.
func onCall(name string, do func() error) library.Hook {
	return func(call string) error {
		if call == name {
			return do()
		}
		return nil
	}
}

var errOfLibrary = status.New(status.Failed, status.StageTransfer, "the library has no mood")

// The library sees nothing that its peer has registered since the first transfer over their link. Nobody notices.
func TestWhatWasRegisteredAfterTheFirstTransferIsPulled(t *testing.T) {
	overTheLibrary(t, func(w *world) {
		owner, puller := w.pair()
		for i, from := range []*node{owner, puller, owner, puller} {
			to := owner
			if from == owner {
				to = puller
			}
			src, dst := from.register(rows(2, 1, 1000), two[0]).fill(uint64(i)), to.register(rows(2, 1, 1000))
			require.NoError(w.t, to.pull(from, normal(7), dst, all()))
			dst.requireContent(src.content())
			src.remove()
		}
		require.Greater(w.t, puller.object.Made(), int64(1), "the link was made anew")
		require.Zero(w.t, owner.object.Made(), "by the end that has dialed, also for the other one")
		require.Contains(w.t, puller.Explain(1), "in use")
	})
}

// Both ends pull what the other one has just registered: each makes the other one's transfers meet links that are made anew.
func TestBothEndsPullWhatIsNewAtOnce(t *testing.T) {
	overTheLibrary(t, func(w *world) {
		a, b := w.pair()
		const pullers, rounds = 3, 15
		together(2*pullers, func(i int) {
			from, to := a, b
			if i%2 == 1 {
				from, to = b, a
			}
			dst := to.register(rows(2, 1, 1000))
			for round := range rounds {
				src := from.register(rows(2, 1, 1000)).fill(uint64(i*rounds + round))
				if err := to.pull(from, byID(src, 0), dst, all()); err != nil {
					t.Errorf("puller %d, round %d: %v", i, round, err)
					return
				}
				if !dst.equals(src.content()) {
					t.Errorf("puller %d, round %d: wrong bytes", i, round)
				}
				src.remove()
			}
		})
	})
}

func TestAPushIsPulledByTheReceiversLibrary(t *testing.T) {
	overTheLibrary(t, func(w *world) {
		receiver, pusher := w.pair(oneSided)
		src, dst := pusher.register(blocks(2, 4, 100)).fill(1), receiver.register(blocks(2, 4, 100), paged...)
		var pulls atomic.Int64
		receiver.object.Interpose(onCall("Pull", func() error { pulls.Add(1); return nil }))
		push := toKey(blocksKey(3))
		push.Plan.SrcBlocks, push.Plan.DstBlocks = []uint64{0, 2}, []uint64{3, 1}
		want := dst.after(push.Plan, src.content(), src.desc, 0)
		require.NoError(w.t, pusher.push(receiver, src, push))
		dst.requireContent(want)
		require.Positive(w.t, pulls.Load())
	})
}

func TestALinkOfTheLibraryThatIsLostIsMadeAnew(t *testing.T) {
	overTheLibrary(t, func(w *world) {
		owner, puller := w.pair()
		src, dst := owner.register(rows(2, 1, 1000), two[0]).fill(1), puller.register(rows(2, 1, 1000))
		require.NoError(w.t, puller.pull(owner, normal(7), dst, all()))
		puller.object.Break(owner.object.Name())
		require.NoError(w.t, puller.pull(owner, normal(7), dst.fill(8), all()), "our link lives, and has another of the library's")
		dst.requireContent(src.content())

		puller.object.Interpose(onCall("Pull", func() error { return errOfLibrary }))
		made := puller.object.Made()
		requireCode(w.t, status.Failed, puller.pull(owner, normal(7), dst, all()))
		require.Contains(w.t, puller.Explain(1), errOfLibrary.Cause)
		puller.object.Interpose(nil)
		require.NoError(w.t, puller.pull(owner, normal(7), dst.fill(7), all()))
		dst.requireContent(src.content())
		require.Equal(w.t, made+1, puller.object.Made(), "one that has failed is not used again")

		require.NoError(w.t, puller.object.Unlink(owner.object.Name()))
		require.NoError(w.t, puller.pull(owner, normal(7), dst.fill(9), all()), "where the library says that there is none, at once")
		dst.requireContent(src.content())
	})
}

func TestWhatTheLibraryRefusesIsStreamed(t *testing.T) {
	overTheLibrary(t, func(w *world) {
		owner, puller := w.pair()
		puller.told()
		puller.object.Interpose(onCall("Register", func() error { return errOfLibrary }))
		dst := puller.register(rows(2, 1, 1000))
		puller.object.Interpose(onCall("Pull", func() error { return errOfLibrary }))
		events := puller.told()
		require.Len(w.t, events, 1)
		require.Equal(w.t, link.Warning, events[0].Level)
		require.ErrorIs(w.t, events[0].Cause, errOfLibrary)
		src := owner.register(rows(2, 1, 1000), two[0]).fill(1)
		require.NoError(w.t, puller.pull(owner, normal(7), dst, all()))
		dst.requireContent(src.content())

		row, into := owner.register(rows(2, 1, 120), two[1]).fill(4), puller.register(blocks(2, 4, 40))
		pieces := all()
		pieces.DstBlocks = []uint64{2, 0, 3}
		want := into.after(pieces, row.content(), row.desc, 0)
		puller.object.Interpose(onCall("Register", func() error { return errOfLibrary }))
		require.NoError(w.t, puller.pull(owner, normal(8), into, pieces), "a row into blocks, for which there is no stage")
		into.requireContent(want)
		puller.object.Interpose(onCall("Pull", func() error { return errOfLibrary }))

		known := puller.register(rows(2, 1, 1000))
		requireCode(w.t, status.Failed, puller.pull(owner, normal(7), known, all()))
		require.NoError(w.t, owner.pull(puller, byID(dst, 0), src.fill(3), all()), "what the owner's library does not know")
		src.requireContent(dst.content())
	})
}

func TestALinkWhoseLibraryHasNoneGoesOverTCP(t *testing.T) {
	overTheLibrary(t, func(w *world) {
		either := func(o *Options) { o.Transport = "auto" }
		owner, puller := w.node("owner", 1, either), w.node("puller", 2, either)
		puller.object.Interpose(onCall("Link", func() error { return errOfLibrary }))
		puller.link(owner)
		require.Contains(w.t, puller.Explain(1), "transport: tcp")
		require.Contains(w.t, puller.Explain(1), "not taken: cann: ")
		require.Contains(w.t, puller.Explain(1), errOfLibrary.Cause)
		a, b := owner.register(rows(2, 1, 1000), two[0]).fill(1), puller.register(rows(2, 1, 1000), two[1])
		require.NoError(w.t, puller.pull(owner, normal(7), b, all()))
		b.requireContent(a.content())
		b.fill(2)
		require.NoError(w.t, owner.pull(puller, normal(8), a, all()), "the other end, which does not dial, hears of it and streams")
		a.requireContent(b.content())
		require.Contains(w.t, owner.Explain(2), "no vendor's library moves the bytes of this link")

		required := w.node("required", 3)
		required.object.Interpose(onCall("Link", func() error { return errOfLibrary }))
		e := requireCode(w.t, status.LinkFailed, required.tryLink(owner))
		require.Contains(w.t, e.Cause, errOfLibrary.Cause)
	})
}

// A library whose link takes for ever, such as over a port that somebody filters, leaves time to link and to pull without it.
func TestALinkOfTheLibraryThatIsNotMadeInTimeIsDoneWithout(t *testing.T) {
	const enough = 2 * time.Second
	overTheLibrary(t, func(w *world) {
		either := func(o *Options) { o.Transport = "auto" }
		owner, puller := w.node("owner", 1, either), w.node("puller", 2, either)
		proceed := make(chan struct{})
		silent := onCall("Link", func() error { <-proceed; return errOfLibrary })
		puller.object.Interpose(silent)
		link := func() error {
			ctx, stop := within(enough)
			defer stop()
			return puller.LinkClusters(ctx, []Cluster{owner.cluster()})[0]
		}
		require.NoError(w.t, link())
		require.Contains(w.t, puller.Explain(1), "transport: tcp")
		close(proceed)
		require.NoError(w.t, puller.unlink(owner, false))

		puller.object.Interpose(nil)
		require.NoError(w.t, link())
		require.Contains(w.t, puller.Explain(1), "transport: cann")
		require.NoError(w.t, puller.object.Unlink(owner.object.Name()))
		require.NoError(w.t, owner.object.Unlink(puller.object.Name()))
		proceed = make(chan struct{})
		puller.object.Interpose(silent)
		src, dst := puller.register(rows(2, 1, 1000), two[0]).fill(1), owner.register(rows(2, 1, 1000))
		short, stop := within(enough)
		defer stop()
		require.NoError(w.t, owner.pullWithin(short, puller, normal(7), dst, all()))
		dst.requireContent(src.content())
		close(proceed)
	})
}

// blocked has the object's next pulls begin and wait.
func blocked(o *library.Object) stalled {
	s := stalled{make(chan struct{}), make(chan struct{})}
	var once atomic.Bool
	o.Interpose(onCall("Pull", func() error {
		if !once.Swap(true) {
			close(s.begun)
		}
		<-s.proceed
		return nil
	}))
	return s
}

func TestACallThatOutlivesItsDeadlineKeepsWhatItMayWrite(t *testing.T) {
	overTheLibrary(t, func(w *world) {
		owner, puller := w.pair()
		src := owner.allocate(rows(2, 1, 1000), two[0]).fill(1)
		dst := puller.allocate(rows(2, 1, 1000)).fill(2)
		was := dst.content()
		late := blocked(puller.object)
		ctx, cancel := context.WithCancel(context.Background())
		pull := begin(func() error { return puller.pullWithin(ctx, owner, normal(7), dst, all()) })
		late.await(w.t, pull)
		cancel()
		requireCode(w.t, status.Failed, pull.wait())
		dst.requireContent(was)

		e := requireCode(w.t, status.Failed, puller.pull(owner, normal(7), dst, all()))
		require.Contains(w.t, e.Cause, "outlived its deadline")
		requireCode(w.t, status.Failed, puller.CopyCache(CopyCall{Dst: dst.id, Src: dst.id, Size: -1}))
		requireCode(w.t, status.Failed, owner.pull(puller, byID(dst, 0), src, all()))
		other := puller.register(rows(2, 1, 1000))
		short, stop := within(time.Millisecond)
		requireCode(w.t, status.Timeout, puller.pullWithin(short, owner, normal(7), other, all()))
		stop()
		require.NoError(w.t, puller.Deallocate(dst.id, false))
		require.NotZero(w.t, puller.Stats().PoolBytes, "it may still be written")

		close(late.proceed)
		puller.object.Interpose(nil)
		w.eventually(func() bool { return puller.Stats().PoolBytes == 0 }, "the memory is free")
		w.eventually(func() bool { return owner.Stats().Leases == 0 }, "the lease has ended")
		require.NoError(w.t, puller.pull(owner, normal(7), other, all()), "a pull that failed has released no key")
		other.requireContent(src.content())
	})
}

// Callers use their block lists again when a call has returned, whatever the library still does.
func TestACallThatOutlivesItsDeadlineHasListsOfItsOwn(t *testing.T) {
	overTheLibrary(t, func(w *world) {
		owner, puller := w.pair()
		src, dst := owner.register(blocks(2, 4, 100), paged...).fill(1), puller.register(blocks(2, 4, 100)).fill(2)
		p := all()
		p.SrcBlocks, p.DstBlocks = []uint64{0, 2}, []uint64{3, 1}
		want := dst.after(p, src.content(), src.desc, 0)
		late := blocked(puller.object)
		ctx, cancel := context.WithCancel(context.Background())
		pull := begin(func() error { return puller.pullWithin(ctx, owner, blocksKey(3), dst, p) })
		late.await(w.t, pull)
		cancel()
		requireCode(w.t, status.Failed, pull.wait())
		copy(p.SrcBlocks, []uint64{1, 3})
		copy(p.DstBlocks, []uint64{0, 2})
		close(late.proceed)
		w.eventually(func() bool { return puller.Stats().Uses == 0 }, "the library has returned")
		dst.requireContent(want)
	})
}

// A stage takes memory of the device's and a registration. Where it can't be had the row into blocks is streamed.
func TestARowIntoBlocksWithoutAStageIsStreamed(t *testing.T) {
	overTheLibrary(t, func(w *world) {
		owner, puller := w.pair()
		src, dst := owner.register(rows(2, 1, 400), two[0]).fill(1), puller.register(blocks(2, 6, 100))
		held := puller.device.Held()
		puller.object.Interpose(onCall("Register", func() error { return errOfLibrary }))
		p := all()
		p.DstBlocks = []uint64{5, 0, 3, 1}
		want := dst.after(p, src.content(), src.desc, 0)
		require.NoError(w.t, puller.pull(owner, normal(7), dst, p))
		dst.requireContent(want)
		require.Equal(w.t, held, puller.device.Held(), "a stage that the library refuses goes back")

		puller.object.Interpose(nil)
		require.NoError(w.t, puller.pull(owner, normal(7), dst, p))
		dst.requireContent(want)
		require.Equal(w.t, held+1, puller.device.Held(), "the stage of the next one")
	})
}

func TestFinalizeLeavesMemoryToACallThatDoesNotReturn(t *testing.T) {
	overTheLibrary(t, func(w *world) {
		owner, puller := w.pair(func(o *Options) { o.SyncTimeout = 10 * time.Millisecond })
		owner.allocate(rows(2, 1, 1000), two[0]).fill(1)
		dst := puller.allocate(rows(2, 1, 1000))
		late := blocked(puller.object)
		short, stop := within(time.Second)
		defer stop()
		pull := begin(func() error { return puller.pullWithin(short, owner, normal(7), dst, all()) })
		late.await(w.t, pull)
		puller.stopped = true
		require.NoError(w.t, puller.Close())
		require.Error(w.t, pull.wait())
		require.Equal(w.t, 1, puller.Stats().Retiring)
		require.Positive(w.t, puller.device.Held(), "the pool is still there")
		told := puller.told()
		require.Equal(w.t, link.Error, told[len(told)-1].Level)
		close(late.proceed)
		w.eventually(func() bool { return puller.held().Retiring == 0 && w.objects.Open() == 1 }, "all of it is gone")
	})
}

func TestAPullWhoseLinkDiesEndsAndReleasesNothing(t *testing.T) {
	overTheLibrary(t, func(w *world) {
		owner, puller := w.pair()
		src := owner.allocate(rows(2, 1, 1000), two[0]).fill(1)
		dst := puller.register(rows(2, 1, 1000))
		late := blocked(puller.object)
		pull := begin(func() error { return puller.pull(owner, normal(7), dst, all()) })
		late.await(w.t, pull)
		require.NoError(w.t, puller.unlink(owner, true))
		requireCode(w.t, status.Failed, pull.wait())
		close(late.proceed)
		puller.object.Interpose(nil)
		w.eventually(func() bool { return owner.Stats().Leases == 0 && puller.Stats().Uses == 0 }, "both ends have let go")
		puller.link(owner)
		require.NoError(w.t, puller.pull(owner, normal(7), dst, all()))
		dst.requireContent(src.content())
		requireCode(w.t, status.CacheNotExist, puller.pull(owner, normal(7), dst, all()))
	})
}

// Bytes of a cache that was withdrawn while the library moved them are no success, whatever they are.
func TestACacheThatIsWithdrawnUnderTheLibraryIsNoSuccess(t *testing.T) {
	overTheLibrary(t, func(w *world) {
		owner, puller := w.pair()
		src, dst := owner.register(rows(2, 1, 1000), two[0]).fill(1), puller.register(rows(2, 1, 1000))
		late := blocked(puller.object)
		pull := begin(func() error { return puller.pull(owner, normal(7), dst, all()) })
		late.await(w.t, pull)
		src.remove() // does not wait for the peer
		close(late.proceed)
		e := requireCode(w.t, status.CacheNotExist, pull.wait())
		require.Equal(w.t, status.StageVerify, e.Stage)
	})
}

func TestTheLibraryForgetsWhatIsGone(t *testing.T) {
	overTheLibrary(t, func(w *world) {
		n := w.node("alone", 1)
		for range 3 {
			registered, allocated := n.register(rows(2, 1, 100)), n.allocate(rows(2, 1, 100))
			require.Equal(w.t, 2, n.object.Registered())
			registered.remove()
			require.NoError(w.t, n.Deallocate(allocated.id, false))
			require.Zero(w.t, n.object.Registered())
		}
	})
}

func TestEnginesWithoutTheLibrary(t *testing.T) {
	over(t, []way{overTCP}, func(w *world) {
		_, err := New(1, Options{Transport: nameCANN}, Parts{Device: mem.Host(), Network: TCP()})
		requireCode(w.t, status.FeatureNotEnabled, err)
		n := w.node("alone", 1)
		_, err = n.attachLibrary(link.Peer{Card: []byte{0xff}}, nil)
		require.ErrorContains(w.t, err, "read what the peer says")
		_, err = n.attachLibrary(link.Peer{Card: []byte{0xa0}, Incarnation: link.Incarnation{1}}, nil)
		require.ErrorContains(w.t, err, "not of its incarnation")
		_, err = n.attachLibrary(link.Peer{Card: []byte{0xa0}, Local: "127.0.0.1:1", Address: "nowhere"}, nil)
		require.Error(w.t, err)
	})
}
