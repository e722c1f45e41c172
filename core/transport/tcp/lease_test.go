// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
	"github.com/llm-datadist-open/llm-datadist/core/transport/fabric"
)

func TestConsumingPullIsDoneOnceBeforeItReturns(t *testing.T) {
	overEach(t, 2, func(t *testing.T, l *link) {
		for _, bytes := range []uint64{1, 1000, 1 << 20} {
			src, dst := newCache(t, plan.Contiguous, 4, 1, bytes).randomize(bytes), newCache(t, plan.Contiguous, 4, 1, bytes)
			l.ownerB.offer(1, &offer{cache: src, consumes: true})
			for range 30 {
				req := rows(1, dst)
				req.Plan.SrcTensors, req.Plan.DstTensors = plan.Range{First: 1, Count: 3}, plan.Range{Count: 3}
				require.NoError(t, l.a.Pull(within(t, settleTime), req, dst.local()))
				done, drops := l.ownerB.last().outcome()
				require.Equal(t, []plan.Range{{First: 1, Count: 3}}, done)
				require.Zero(t, drops)
			}
		}
	})
}

// A DONE may come before the lane that sent the last byte has noticed that it has.
func TestDoneIsAnsweredAfterTheSourceHasHeardOfIt(t *testing.T) {
	check(t)
	a, b := loopbackConns(t, 1)
	raw := newRaw(t, b[0])
	o := newOwner(t)
	s, _ := newSession(t, a, o)
	src := newCache(t, plan.Contiguous, 1, 1, 4*maxFrame)
	scratch, err := mem.NewBuffer(4096)
	require.NoError(t, err)
	keep(scratch)
	held, gate := make(chan struct{}), make(chan struct{})
	letGo := sync.OnceFunc(func() { close(gate) })
	t.Cleanup(letGo)
	o.offer(1, &offer{cache: src, consumes: true, acquire: func(_ *source, n int64) bool {
		if n == 3 {
			close(held)
			<-gate
		}
		return true
	}})
	raw.request(1, 0, time.Minute, rows(1, src))
	raw.expect(kindEntry, 1)
	drain := make(chan struct{})
	go func() { // makes room, so that the third call comes
		defer close(drain)
		raw.next()
	}()
	receiveFrom(t, held)
	served := s.serving(1)
	require.NotNil(t, served)
	raw2 := &rawPeer{t: t, conn: raw.conn, b: scratch}
	raw2.send(header{kind: kindDone, flags: flagAll, operation: 1}, nil)
	require.Eventually(t, served.stopped, settleTime, time.Millisecond, "DONE is not heard")
	done, _ := o.last().outcome()
	require.Empty(t, done, "a lane still holds the source")
	letGo()
	<-drain
	for {
		h, _ := raw.next()
		if h.kind == kindConfirmed {
			require.Zero(t, h.a)
			break
		}
	}
	done, _ = o.last().outcome()
	require.Equal(t, []plan.Range{{All: true}}, done)
}

func TestCancelledConsumingPullReleasesNothing(t *testing.T) {
	overEach(t, 2, func(t *testing.T, l *link) {
		src, dst := newCache(t, plan.Contiguous, 1, 1, 4<<20), newCache(t, plan.Contiguous, 1, 1, 4<<20)
		ctx, cancel := context.WithCancel(context.Background())
		returned := make(chan struct{})
		letGo := sync.OnceFunc(func() { close(returned) })
		t.Cleanup(letGo)
		l.ownerB.offer(1, &offer{cache: src, consumes: true, acquire: func(_ *source, n int64) bool {
			if n == 2 {
				cancel()
				<-returned
			}
			return true
		}})
		requireStatus(t, l.a.Pull(ctx, rows(1, dst), dst.local()), status.Failed, "cancelled")
		letGo()
		s := l.ownerB.last()
		receiveFrom(t, s.ended)
		done, drops := s.outcome()
		require.Empty(t, done)
		require.Equal(t, 1, drops)
	})
}

// lease makes a raw initiator on the fabric that has asked for a key and seen what it resolved to.
func lease(t *testing.T, bytes uint64, deadline time.Duration, flags uint8) (*Session, *rawPeer, *source) {
	raw, o, s, _ := newStranger(t, 1)
	c := newCache(t, plan.Contiguous, 1, 1, bytes)
	o.offer(1, &offer{cache: c, consumes: true})
	raw.request(1, flags, deadline, rows(1, c))
	raw.expect(kindEntry, 1)
	return s, raw, o.last()
}

func TestLeaseEndsAtItsDeadlineAndASecond(t *testing.T) {
	for name, flags := range map[string]uint8{"bytes": 0, "resolve": flagResolve} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				_, raw, source := lease(t, 1000, 500*time.Millisecond, flags)
				time.Sleep(1499 * time.Millisecond) // virtual time: just before the deadline and its second
				synctest.Wait()
				require.Zero(t, source.dropped())
				time.Sleep(2 * time.Millisecond) // virtual time: just after
				synctest.Wait()
				require.Equal(t, 1, source.dropped())
				if flags == 0 {
					raw.expect(kindData, 1)
				}
				h, _ := raw.expect(kindFail, 1)
				require.EqualValues(t, status.Timeout, h.a)
				raw.send(header{kind: kindDone, flags: flagAll, operation: 1}, nil)
				h, _ = raw.expect(kindConfirmed, 1)
				require.EqualValues(t, status.Timeout, h.a)
			})
		})
	}
}

func TestLeaseEndsAlthoughTheInitiatorDoesNotRead(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		_, raw, source := lease(t, 4<<20, 500*time.Millisecond, 0)
		time.Sleep(1500*time.Millisecond + 2*transport.MaxWaitMillis*time.Millisecond) // virtual time: until the send that is under way has ended too
		synctest.Wait()
		require.Equal(t, 1, source.dropped())
		h, body := raw.expect(kindData, 1)
		require.NotZero(t, body[h.length], "the frame that was under way doesn't count")
		raw.expect(kindFail, 1)
	})
}

func TestLeaseEndsByCancelAndByTheDeathOfTheLink(t *testing.T) {
	for name, end := range map[string]func(raw *rawPeer){
		"cancel": func(raw *rawPeer) { raw.send(header{kind: kindCancel, operation: 1}, nil) },
		"death":  func(raw *rawPeer) { raw.conn.Shutdown() },
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				s, raw, source := lease(t, 1000, time.Hour, 0)
				raw.expect(kindData, 1)
				synctest.Wait()
				require.Zero(t, source.dropped())
				end(raw)
				<-source.ended
				require.Equal(t, 1, source.dropped())
				<-s.Idle()
			})
		})
	}
}

// A call without a deadline ends when the owner gives up on it.
func TestOwnerTellsWhenItGivesUp(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		l := overFabric(t, 1, fabric.Faults{BytesPerSecond: 1000})
		src := newCache(t, plan.Contiguous, 1, 1, 4<<20)
		l.ownerB.offer(1, &offer{cache: src})
		err := l.a.Pull(context.Background(), rows(1, src), src.local())
		requireStatus(t, err, status.Timeout, "by the owner's clock")
	})
}

func TestResolvedLeaseIsConfirmedOrAbandoned(t *testing.T) {
	overEach(t, 2, func(t *testing.T, l *link) {
		src := newCache(t, plan.Contiguous, 2, 1, 1000)
		l.ownerB.offer(1, &offer{cache: src, consumes: true})
		for _, confirm := range []bool{true, false} {
			r, err := l.a.Resolve(within(t, settleTime), rows(1, src))
			require.NoError(t, err)
			require.Equal(t, src.shape, r.Shape)
			require.EqualValues(t, 7, r.Generation)
			require.False(t, isClosed(l.a.Idle()))
			s := l.ownerB.last()
			if confirm {
				require.NoError(t, r.Lease.Confirm(within(t, settleTime)))
			}
			r.Lease.Abandon()
			receiveFrom(t, s.ended)
			done, drops := s.outcome()
			require.Len(t, done, 1-drops)
			require.Equal(t, confirm, drops == 0)
			require.True(t, isClosed(l.a.Idle()))
		}
	})
}
