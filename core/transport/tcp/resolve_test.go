// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

func TestResolveReturnsTheEntryAndMovesNothing(t *testing.T) {
	overEach(t, 2, func(t *testing.T, l *link) {
		src, dst := newCache(t, plan.Contiguous, 3, 2, 1<<20).randomize(1), newCache(t, plan.Contiguous, 3, 2, 1<<20)
		l.ownerB.offer(1, &offer{cache: src, batch: 1})
		for range 10 {
			r, err := l.a.Resolve(within(t, settleTime), rows(1, dst))
			require.NoError(t, err)
			require.Equal(t, uint64(7), r.Generation)
			require.Equal(t, src.shape, r.Shape)
			require.Equal(t, uint64(1), r.Batch)
			require.Nil(t, r.Lease)
			require.Equal(t, 1, l.ownerB.last().dropped(), "nothing is held")
			require.Zero(t, l.ownerB.last().acquires.Load())
		}
		<-l.a.Idle()
		<-l.b.Idle()
		_, err := l.a.Resolve(within(t, settleTime), rows(2, dst))
		require.ErrorIs(t, err, status.CacheNotExist)
		require.NoError(t, l.a.Pull(within(t, settleTime), rows(1, dst), dst.local()), "and bytes flow on the same connections")
	})
}

func TestResolveOfAConsumedKeyHoldsALeaseUntilItIsConfirmedOrAbandoned(t *testing.T) {
	overEach(t, 2, func(t *testing.T, l *link) {
		src, dst := newCache(t, plan.Contiguous, 3, 1, 1000), newCache(t, plan.Contiguous, 2, 1, 1000)
		l.ownerB.offer(1, &offer{cache: src, consumes: true})
		req := rows(1, dst)
		req.Plan.SrcTensors = plan.Range{First: 1, Count: 2}
		r, err := l.a.Resolve(within(t, settleTime), req)
		require.NoError(t, err)
		idle := l.b.Idle()
		select {
		case <-idle:
			require.Fail(t, "idle with a lease")
		default:
		}
		require.NoError(t, r.Lease.Confirm(within(t, settleTime)))
		done, drops := l.ownerB.last().outcome()
		require.Equal(t, []plan.Range{{First: 1, Count: 2}}, done)
		require.Zero(t, drops)
		<-idle

		r, err = l.a.Resolve(within(t, settleTime), req)
		require.NoError(t, err)
		r.Lease.Abandon()
		<-l.ownerB.last().ended
		require.Equal(t, 1, l.ownerB.last().dropped())
		<-l.a.Idle()
	})
}

func TestALeaseEndsWithItsLink(t *testing.T) {
	overEach(t, 1, func(t *testing.T, l *link) {
		src := newCache(t, plan.Contiguous, 1, 1, 1000)
		l.ownerB.offer(1, &offer{cache: src, consumes: true})
		first, err := l.a.Resolve(within(t, settleTime), rows(1, src))
		require.NoError(t, err)
		second, err := l.a.Resolve(within(t, settleTime), rows(1, src))
		require.NoError(t, err)
		l.b.Close(errClosed)
		for _, s := range l.ownerB.all() {
			require.Equal(t, 1, s.dropped())
		}
		<-l.brokenA
		require.NoError(t, first.Lease.Confirm(within(t, settleTime)), "nobody can say any more that the key was not released")
		second.Lease.Abandon()
		_, err = l.a.Resolve(within(t, settleTime), rows(1, src))
		require.ErrorIs(t, err, status.NotYetLink)
	})
}

func TestALeaseThatHasExpiredIsNotConfirmed(t *testing.T) {
	overEach(t, 1, func(t *testing.T, l *link) {
		src := newCache(t, plan.Contiguous, 1, 1, 1000)
		l.ownerB.offer(1, &offer{cache: src, consumes: true})
		ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
		defer cancel()
		r, err := l.a.Resolve(ctx, rows(1, src))
		require.NoError(t, err)
		l.b.mu.Lock()
		var served []*serve
		for _, v := range l.b.serves {
			served = append(served, v)
		}
		l.b.mu.Unlock()
		require.Len(t, served, 1)
		served[0].expire()
		require.ErrorIs(t, r.Lease.Confirm(ctx), status.Timeout)
		require.Equal(t, 1, l.ownerB.last().dropped())
	})
}

func TestALeaseThatIsAskedForIsHeldAndJudged(t *testing.T) {
	overEach(t, 1, func(t *testing.T, l *link) {
		src := newCache(t, plan.Contiguous, 1, 1, 1000)
		o := &offer{cache: src, native: 1 << 40}
		l.ownerB.offer(1, o)
		asking := rows(1, src)
		asking.Lease = true
		resolve := func() transport.Resolved {
			r, err := l.a.Resolve(within(t, settleTime), asking)
			require.NoError(t, err)
			require.Equal(t, int64(1<<40), r.Native)
			require.NotNil(t, r.Lease)
			require.Zero(t, l.ownerB.last().dropped(), "held, though no key is consumed")
			return r
		}
		require.NoError(t, resolve().Lease.Confirm(within(t, settleTime)))
		resolve().Lease.Abandon()
		<-l.ownerB.last().ended

		o.revoked.Store(true)
		require.ErrorIs(t, resolve().Lease.Confirm(within(t, settleTime)), status.CacheNotExist)
		o.revoked.Store(false)

		r := resolve()
		ended, cancel := context.WithCancel(context.Background())
		cancel()
		require.ErrorIs(t, r.Lease.Confirm(ended), status.Failed, "the owner has not said that it was good")
		r = resolve()
		l.b.Close(errClosed)
		<-l.brokenA
		require.ErrorIs(t, r.Lease.Confirm(within(t, settleTime)), status.Failed, "nobody says that it was good")
	})
}

func TestResolveEndsWithItsContext(t *testing.T) {
	overEach(t, 1, func(t *testing.T, l *link) {
		src := newCache(t, plan.Contiguous, 1, 1, 1000)
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		_, err := l.a.Resolve(ctx, rows(1, src))
		require.ErrorIs(t, err, status.Failed)
		<-l.a.Idle()
	})
}
