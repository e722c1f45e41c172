// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
	"github.com/llm-datadist-open/llm-datadist/core/transport/fabric"
)

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

func TestCloseEndsEveryOperationOnce(t *testing.T) {
	overEach(t, 2, func(t *testing.T, l *link) {
		src, dst := newCache(t, plan.Contiguous, 1, 1, 1<<20), newCache(t, plan.Contiguous, 1, 1, 1<<20)
		stuck, held := make(chan struct{}, 100), make(chan struct{})
		letGo := sync.OnceFunc(func() { close(held) })
		t.Cleanup(letGo)
		l.ownerB.offer(1, &offer{cache: src, consumes: true, acquire: func(*source, int64) bool {
			stuck <- struct{}{}
			<-held
			return true
		}})
		var results []<-chan error
		for range 8 {
			results = append(results, pulling(l.a, context.Background(), rows(1, dst), dst))
		}
		receiveFrom(t, stuck)
		require.Eventually(t, func() bool {
			l.a.mu.Lock()
			defer l.a.mu.Unlock()
			return len(l.a.pulls) == len(results)
		}, settleTime, time.Millisecond, "not all pulls are under way")
		cause := status.New(status.Failed, status.StageClose, "we have had enough")
		var closers sync.WaitGroup
		for range 3 {
			closers.Go(func() { l.a.Close(cause) })
		}
		for _, result := range results {
			requireStatus(t, receiveFrom(t, result), status.Failed, "we have had enough")
		}
		closers.Wait()
		requireStatus(t, l.a.Pull(context.Background(), rows(1, dst), dst.local()), status.NotYetLink, "we have had enough")
		require.Empty(t, l.brokenA, "who closes need not be told")
		require.True(t, isClosed(l.a.Idle()))
		letGo()
		requireStatus(t, receiveFrom(t, l.brokenB), status.Failed, "peer died or unlinked")
		for _, s := range l.ownerB.all() {
			receiveFrom(t, s.ended)
			require.Equal(t, 1, s.dropped())
		}
		receiveFrom(t, l.b.Idle())
	})
}

func TestIdleWaitsForTheLastOperation(t *testing.T) {
	check(t)
	s, raw, dst := against(t)
	require.True(t, isClosed(s.Idle()))
	ctx, cancel := context.WithCancel(context.Background())
	result := pulling(s, ctx, rows(1, dst), dst)
	raw.expect(kindRequest, 1)
	idle := s.Idle()
	require.False(t, isClosed(idle))
	cancel()
	requireStatus(t, receiveFrom(t, result), status.Failed, "cancelled")
	require.True(t, isClosed(idle))
	require.True(t, isClosed(s.Idle()))
}

func TestIdleWaitsForServedOperations(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, raw, source := lease(t, 1000, time.Hour, 0)
		idle := s.Idle()
		raw.expect(kindData, 1)
		synctest.Wait()
		require.False(t, isClosed(idle), "a lease is an operation")
		raw.send(header{kind: kindDone, flags: flagAll, operation: 1}, nil)
		raw.expect(kindConfirmed, 1)
		<-idle
		require.Zero(t, source.dropped())
	})
}

func TestBrokenIsCalledOnceWhateverBreaks(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		l := overFabric(t, 4, fabric.Faults{BytesPerSecond: 1 << 20})
		src, dst := newCache(t, plan.Contiguous, 1, 1, 8<<20), newCache(t, plan.Contiguous, 1, 1, 8<<20)
		l.ownerB.offer(1, &offer{cache: src, consumes: true})
		l.ownerA.offer(1, &offer{cache: src})
		var results []<-chan error
		for range 5 {
			results = append(results, pulling(l.a, context.Background(), rows(1, dst), dst), pulling(l.b, context.Background(), rows(1, dst), dst))
		}
		time.Sleep(time.Second) // virtual time: all pulls are under way by then
		l.net.CutAll()
		for _, result := range results {
			requireStatus(t, <-result, status.Failed, "peer died")
		}
		requireStatus(t, <-l.brokenA, status.Failed, "peer died")
		requireStatus(t, <-l.brokenB, status.Failed, "peer died")
		synctest.Wait()
		require.Empty(t, l.brokenA)
		require.Empty(t, l.brokenB)
		require.True(t, isClosed(l.a.Idle()))
		require.True(t, isClosed(l.b.Idle()))
	})
}

func TestDeathOfTheLinkWhileDoneIsUnderWayIsASuccess(t *testing.T) {
	check(t)
	s, raw, dst := against(t)
	result := pulling(s, context.Background(), rows(1, dst), dst)
	raw.expect(kindRequest, 1)
	raw.entry(1, rows(1, dst), dst.shape, true)
	raw.data(1, 0, make([]byte, dst.shape.Stride), 0)
	raw.expect(kindDone, 1)
	raw.conn.Shutdown()
	require.NoError(t, receiveFrom(t, result))
}

func TestConfirmationThatTheLeaseHadEndedIsAnError(t *testing.T) {
	check(t)
	s, raw, dst := against(t)
	result := pulling(s, context.Background(), rows(1, dst), dst)
	raw.expect(kindRequest, 1)
	raw.entry(1, rows(1, dst), dst.shape, true)
	raw.data(1, 0, make([]byte, dst.shape.Stride), 0)
	raw.expect(kindDone, 1)
	raw.send(header{kind: kindConfirmed, operation: 1, a: uint64(status.Timeout)}, nil)
	requireStatus(t, receiveFrom(t, result), status.Timeout, "lease had ended")
	requireWorks(t, s, raw, dst)
}

func TestSessionsComeAndGoUnderLoad(t *testing.T) {
	check(t)
	for i := range int64(20) {
		l := loopback(t, 2)
		src, dst := newCache(t, plan.Contiguous, 1, 1, 300_000), newCache(t, plan.Contiguous, 1, 1, 300_000)
		var chunks atomic.Int64
		cut := make(chan struct{}) // it is where the load is cut that differs from round to round
		count := func(*source, int64) bool {
			if chunks.Add(1) == 1+7*i {
				close(cut)
			}
			return true
		}
		l.ownerA.offer(1, &offer{cache: src, consumes: true, acquire: count})
		l.ownerB.offer(1, &offer{cache: src, acquire: count})
		var callers sync.WaitGroup
		for caller := range 4 {
			s := []*Session{l.a, l.b}[caller%2]
			callers.Go(func() {
				for s.Pull(within(t, settleTime), rows(1, dst), dst.local()) == nil {
				}
			})
		}
		receiveFrom(t, cut)
		l.a.Close(errClosed)
		l.b.Close(errClosed)
		callers.Wait()
	}
}

func TestASessionNeedsAConnection(t *testing.T) {
	_, err := NewSession(Config{})
	requireStatus(t, err, status.ParamInvalid, "without a data connection")
}

var _ transport.Session = (*Session)(nil)
