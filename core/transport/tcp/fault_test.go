// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
	"github.com/llm-datadist-open/llm-datadist/core/transport/fabric"
)

// soon is how late a call may return after it was told to: ten waits.
const soon = 10 * transport.MaxWaitMillis * time.Millisecond

func TestPullEndsInMidFrameOfASilentPeer(t *testing.T) {
	for name, end := range map[string]func() (context.Context, context.CancelFunc){
		"cancel":   func() (context.Context, context.CancelFunc) { return context.WithCancel(context.Background()) },
		"deadline": func() (context.Context, context.CancelFunc) { return context.WithTimeout(context.Background(), soon/4) },
	} {
		t.Run(name, func(t *testing.T) {
			check(t)
			s, raw, dst := against(t)
			ctx, cancel := end()
			defer cancel()
			result := pulling(s, ctx, rows(1, dst), dst)
			h, _ := raw.expect(kindRequest, 1)
			raw.entry(h.operation, rows(1, dst), dst.shape, true)
			whole := dataFrame(h.operation, 0, make([]byte, dst.shape.Stride), 0)
			raw.write(whole[:50_000])
			began := time.Now()
			code := status.Timeout
			if name == "cancel" {
				code = status.Failed
				cancel()
			}
			requireStatus(t, receiveFrom(t, result), code, "")
			require.Less(t, time.Since(began), soon+soon/4)
			stays := dst.content()
			raw.expect(kindCancel, h.operation)
			raw.write(whole[50_000:])
			requireWorks(t, s, raw, dst)
			dst.requireContent(t, stays)
		})
	}
}

// inBubble runs a test under virtual time.
func inBubble(t *testing.T, test func(t *testing.T)) {
	synctest.Test(t, func(t *testing.T) {
		check(t)
		test(t)
	})
}

func TestPullEndsInMidTransferOfAPausedHost(t *testing.T) {
	for i, name := range []string{"initiator", "owner"} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				l := overFabric(t, 2, fabric.Faults{Latency: time.Millisecond})
				src, dst := newCache(t, plan.Contiguous, 1, 1, 8<<20).randomize(1), newCache(t, plan.Contiguous, 1, 1, 8<<20)
				l.ownerB.offer(1, &offer{cache: src, consumes: true, acquire: func(_ *source, n int64) bool {
					if n == 5 {
						l.hosts[i].Pause()
					}
					return true
				}})
				began := time.Now()
				requireStatus(t, l.a.Pull(within(t, 2*time.Second), rows(1, dst), dst.local()), status.Timeout, "deadline")
				require.Less(t, time.Since(began), 2*time.Second+soon)
				stays := dst.content()
				time.Sleep(time.Minute) // virtual time: the lease has ended by then
				require.Equal(t, 1, l.ownerB.last().dropped(), "the lease has ended although the peer doesn't read")
				l.hosts[i].Resume()
				small := newCache(t, plan.Contiguous, 1, 1, 1000).randomize(2)
				l.ownerB.offer(2, &offer{cache: small})
				into := newCache(t, plan.Contiguous, 1, 1, 1000)
				require.NoError(t, l.a.Pull(within(t, time.Second), rows(2, into), into.local()))
				into.requireContent(t, small.content())
				dst.requireContent(t, stays)
			})
		})
	}
}

func TestRequestsToAPeerThatDoesNotReadAreTakenBack(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		l := overFabric(t, 1, fabric.Faults{Buffer: 1000})
		l.hosts[1].Pause()
		dst := newCache(t, plan.Contiguous, 1, 1, 10)
		for range 500 {
			requireStatus(t, l.a.Pull(within(t, time.Millisecond), rows(1, dst), dst.local()), status.Timeout, "deadline")
		}
		lane := l.a.lanes[0]
		lane.queueMu.Lock()
		require.Less(t, len(lane.queue), 20)
		lane.queueMu.Unlock()
		l.hosts[1].Resume()
		l.ownerB.offer(1, &offer{cache: newCache(t, plan.Contiguous, 1, 1, 10)})
		require.NoError(t, l.a.Pull(within(t, time.Second), rows(1, dst), dst.local()))
	})
}

func TestWithdrawnSourceEndsThePullAndNotTheLink(t *testing.T) {
	for _, at := range []int64{1, 3} {
		t.Run(fmt.Sprintf("at call %d", at), func(t *testing.T) {
			overEach(t, 2, func(t *testing.T, l *link) {
				src, dst := newCache(t, plan.Contiguous, 2, 1, 3<<20).randomize(1), newCache(t, plan.Contiguous, 2, 1, 3<<20)
				l.ownerB.offer(1, &offer{cache: src, consumes: true, acquire: func(s *source, n int64) bool {
					if n == at {
						s.withdrawn.Store(true)
					}
					return n < at
				}})
				requireStatus(t, l.a.Pull(within(t, settleTime), rows(1, dst), dst.local()), status.CacheNotExist, "withdrawn")
				l.ownerB.offer(1, &offer{cache: src})
				require.NoError(t, l.a.Pull(within(t, settleTime), rows(1, dst), dst.local()))
				dst.requireContent(t, src.content())
			})
		})
	}
}

func TestUnmappedSourceEndsThePullAndNotTheLink(t *testing.T) {
	for _, at := range []int{0, 5000, 2_500_000} {
		t.Run(fmt.Sprint(at), func(t *testing.T) {
			check(t)
			l := loopback(t, 2)
			src, dst := newCache(t, plan.Contiguous, 1, 1, 3<<20).randomize(1), newCache(t, plan.Contiguous, 1, 1, 3<<20)
			l.ownerB.offer(1, &offer{cache: src, addrs: []uintptr{hole(t, 3<<20, at)}, consumes: true})
			requireStatus(t, l.a.Pull(within(t, settleTime), rows(1, dst), dst.local()), status.ParamInvalid, "owner's registered memory")
			l.ownerB.offer(1, &offer{cache: src})
			require.NoError(t, l.a.Pull(within(t, settleTime), rows(1, dst), dst.local()))
			dst.requireContent(t, src.content())
		})
	}
}

func TestUnmappedDestinationHurtsNobodyElse(t *testing.T) {
	for _, at := range []int{0, 100_000, 2_500_000, 3<<20 - 1} {
		t.Run(fmt.Sprint(at), func(t *testing.T) {
			check(t)
			l := loopback(t, 2)
			src, dst := newCache(t, plan.Contiguous, 1, 1, 3<<20).randomize(1), newCache(t, plan.Contiguous, 1, 1, 3<<20)
			l.ownerB.offer(1, &offer{cache: src})
			l.ownerB.offer(2, &offer{cache: src, consumes: true})
			var other sync.WaitGroup
			other.Go(func() {
				for range 5 {
					if err := l.a.Pull(within(t, settleTime), rows(1, dst), dst.local()); err != nil {
						t.Error(err)
					}
				}
			})
			bad := transport.Local{Addrs: []uintptr{hole(t, 3<<20, at)}}
			for range 3 {
				requireStatus(t, l.a.Pull(within(t, settleTime), rows(2, dst), bad), status.ParamInvalid, "not mapped or not writable")
			}
			other.Wait()
			dst.requireContent(t, src.content())
			for _, s := range l.ownerB.all() {
				receiveFrom(t, s.ended) // at once, by CANCEL, and not when the lease ends
			}
		})
	}
}

func TestASlowPullDoesNotHoldUpASmallOne(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		l := overFabric(t, 1, fabric.Faults{BytesPerSecond: 10 << 20})
		src, dst := newCache(t, plan.Contiguous, 1, 1, 64<<20), newCache(t, plan.Contiguous, 1, 1, 64<<20)
		small, into := newCache(t, plan.Contiguous, 1, 1, 1000), newCache(t, plan.Contiguous, 1, 1, 1000)
		l.ownerB.offer(1, &offer{cache: src})
		l.ownerB.offer(2, &offer{cache: small})
		began := time.Now()
		result := pulling(l.a, within(t, time.Minute), rows(1, dst), dst)
		for range 5 {
			time.Sleep(500 * time.Millisecond) // virtual time: the slow pull fills the connection meanwhile
			began := time.Now()
			require.NoError(t, l.a.Pull(within(t, time.Minute), rows(2, into), into.local()))
			require.Less(t, time.Since(began), 500*time.Millisecond, "a frame and what the connection holds, and no more")
		}
		require.NoError(t, <-result)
		require.Greater(t, time.Since(began), 6*time.Second)
	})
}
