// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
	"github.com/llm-datadist-open/llm-datadist/core/transport/fabric"
)

// fullPush has something in each field.
func fullPush() *transport.Push {
	return &transport.Push{
		Key: transport.Key{Kind: transport.KeyCache, ID: 1, Model: 2, CacheID: -3, Batch: 4}, Addrs: []uint64{5, 1 << 63}, Source: 6, Generation: 7,
		Shape: plan.Shape{Kind: plan.Blocks, Tensors: 8, TensorBytes: 90, Stride: 9, Count: 10},
		Plan: plan.Request{SrcTensors: plan.Range{First: 1, Count: 2}, DstTensors: plan.Range{All: true}, SrcBatch: 11, DstBatch: 12, Size: -1,
			SrcBlocks: []uint64{13, 14}, DstBlocks: []uint64{15, 16}, OneSided: true},
		BlockBytes: 17,
	}
}

func pushFrame(id uint64, what *transport.Push) []byte {
	body := make([]byte, pushBodyBytes(what))
	putPush(body, what)
	return frameOf(header{kind: kindPush, operation: id, a: 1000}, body)
}

// untilTheEnd receives nothing until it is told to end.
func untilTheEnd(ctx context.Context, _ *transport.Push) error {
	<-ctx.Done()
	return transport.Ended(ctx)
}

func pushing(ctx context.Context, s *Session, what *transport.Push) <-chan error {
	result := make(chan error, 1)
	go func() { result <- s.Push(ctx, what) }()
	return result
}

func TestAPushIsPulledByThePeerOverTheSameSession(t *testing.T) {
	overEach(t, 2, func(t *testing.T, l *link) {
		src, dst := newCache(t, plan.Contiguous, 2, 1, 3<<20).randomize(1), newCache(t, plan.Contiguous, 2, 1, 3<<20)
		l.ownerA.offer(7, &offer{cache: src})
		what := fullPush()
		got := make(chan *transport.Push, 1)
		l.ownerB.takes(func(ctx context.Context, push *transport.Push) error {
			got <- push
			return l.b.Pull(ctx, rows(push.Generation, dst), dst.local())
		})
		for range 3 {
			dst.randomize(2)
			require.NoError(t, l.a.Push(within(t, settleTime), what))
			require.Equal(t, what, <-got)
			dst.requireContent(t, src.content())
		}
		receiveFrom(t, l.a.Idle())
		receiveFrom(t, l.b.Idle())
	})
}

func TestARefusedPushSaysWhoRefusesAndWhy(t *testing.T) {
	overEach(t, 1, func(t *testing.T, l *link) {
		l.ownerB.takes(func(context.Context, *transport.Push) error {
			return status.New(status.CacheNotExist, status.StageLookup, "no such cache").Hinting("make one")
		})
		e := requireStatus(t, l.a.Push(within(t, settleTime), fullPush()), status.CacheNotExist, "receiver: no such cache")
		require.Equal(t, status.StageLookup, e.Stage)
		require.Equal(t, "make one", e.Hint)
		l.ownerB.takes(func(context.Context, *transport.Push) error { return nil })
		require.NoError(t, l.a.Push(within(t, settleTime), fullPush()), "the link is whole")
	})
}

func TestAnEndThatTakesNoPushesSaysSo(t *testing.T) {
	check(t)
	a, b := loopbackConns(t, 1)
	s, _ := newSession(t, a, newOwner(t))
	other, err := NewSession(Config{Conns: b, Owner: newOwner(t), Spin: -1, Broken: func(error) {}})
	require.NoError(t, err)
	requireStatus(t, s.Push(within(t, settleTime), fullPush()), status.FeatureNotEnabled, "takes no pushes")
	other.Close(errClosed)
}

func TestAPushThatFitsNoFrameIsRefused(t *testing.T) {
	overEach(t, 1, func(t *testing.T, l *link) {
		what := fullPush()
		what.Plan.DstBlocks = make([]uint64, maxBody/8)
		requireStatus(t, l.a.Push(within(t, settleTime), what), status.ParamInvalid, "more than a control frame")
	})
}

// The receiver is told of the deadline and of the cancel, and its answer comes in time: nothing is in flight, and nothing to wait for.
func TestAPushThatEndsEarlyWaitsForTheReceiver(t *testing.T) {
	for name, c := range map[string]struct {
		ctx  func() (context.Context, context.CancelFunc)
		code status.Code
	}{
		"deadline": {func() (context.Context, context.CancelFunc) {
			return context.WithTimeout(context.Background(), 300*time.Millisecond)
		}, status.Timeout},
		"cancel": {func() (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(context.Background())
			time.AfterFunc(250*time.Millisecond, cancel) // who waits looks every 100 ms, and not just now
			return ctx, cancel
		}, status.Failed},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				l := overFabric(t, 1, fabric.Faults{})
				ended := false
				l.ownerB.takes(func(ctx context.Context, _ *transport.Push) error {
					<-ctx.Done()
					time.Sleep(900 * time.Millisecond) // virtual time: it takes a while to let go
					ended = true
					return transport.Ended(ctx)
				})
				ctx, cancel := c.ctx()
				defer cancel()
				began := time.Now()
				requireStatus(t, l.a.Push(ctx, fullPush()), c.code, "")
				require.True(t, ended)
				require.Equal(t, 1200*time.Millisecond, time.Since(began))
				require.Nil(t, l.a.Unconfirmed())
				<-l.a.Idle()
				<-l.b.Idle()
			})
		})
	}
}

func TestAPushThatSucceedsWhileItIsCancelledHasSucceeded(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		l := overFabric(t, 1, fabric.Faults{})
		l.ownerB.takes(func(ctx context.Context, _ *transport.Push) error {
			<-ctx.Done() // when all bytes are there
			return nil
		})
		require.NoError(t, l.a.Push(within(t, time.Second), fullPush()))
	})
}

// Where no confirmation comes the destination may still change: the caller is told, and what it does next waits for the answer.
func TestOperationsAfterAnUnconfirmedPushWaitForTheAnswer(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		l := overFabric(t, 2, fabric.Faults{})
		src, dst := newCache(t, plan.Contiguous, 1, 1, 1000).randomize(1), newCache(t, plan.Contiguous, 1, 1, 1000)
		l.ownerB.offer(1, &offer{cache: src})
		l.ownerA.offer(1, &offer{cache: src})
		gate := make(chan struct{})
		l.ownerB.takes(func(ctx context.Context, _ *transport.Push) error { <-gate; return transport.Ended(ctx) })
		began := time.Now()
		first, second := pushing(within(t, 300*time.Millisecond), l.a, fullPush()), pushing(within(t, 300*time.Millisecond), l.a, fullPush())
		requireStatus(t, <-first, status.Timeout, "receiver has not confirmed")
		requireStatus(t, <-second, status.Timeout, "receiver has not confirmed")
		require.Equal(t, 1300*time.Millisecond, time.Since(began))
		requireStatus(t, l.a.Push(within(t, 300*time.Millisecond), fullPush()), status.Timeout, "the deadline has passed")
		require.False(t, isClosed(l.a.Idle()), "they are under way still")
		requireStatus(t, l.a.Pull(within(t, time.Second), rows(1, dst), dst.local()), status.Timeout, "deadline")
		operation, err := l.a.Begin(time.Time{}, rows(1, dst), dst.local())
		require.NoError(t, err)
		require.Nil(t, operation, "it can't begin without waiting")
		require.NoError(t, l.b.Pull(within(t, time.Second), rows(1, dst), dst.local()), "the receiver's own pulls wait for nothing")
		theirs := rows(1, dst)
		theirs.Key.Kind = transport.KeyPushed
		require.NoError(t, l.a.Pull(within(t, time.Second), theirs, dst.local()), "nor do those that serve a push of its")

		dst.randomize(3)
		waiting := pulling(l.a, context.Background(), rows(1, dst), dst)
		time.Sleep(time.Hour) // virtual time: as long as it takes
		synctest.Wait()
		require.Empty(t, waiting)
		close(gate)
		require.NoError(t, <-waiting)
		dst.requireContent(t, src.content())
		require.Nil(t, l.a.Unconfirmed())
		<-l.a.Idle()
	})
}

func TestPushesToAPeerThatDoesNotReadAreTakenBack(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		l := overFabric(t, 1, fabric.Faults{Buffer: 1000})
		l.hosts[1].Pause()
		large := fullPush()
		large.Plan.SrcBlocks, large.Plan.DstBlocks = make([]uint64, 1000), make([]uint64, 1000)
		first := pushing(within(t, time.Minute), l.a, large) // fills what the connection takes
		synctest.Wait()
		for range 50 {
			began := time.Now()
			requireStatus(t, l.a.Push(within(t, time.Millisecond), fullPush()), status.Timeout, "deadline")
			require.Equal(t, time.Millisecond, time.Since(began), "nothing of it has gone out: there is nothing to confirm")
		}
		l.hosts[1].Resume()
		requireStatus(t, <-first, status.ParamInvalid, "nothing is expected")
		require.Nil(t, l.a.Unconfirmed())
	})
}

func TestAnAnswerThatIsNoneEndsTheSessionOfAPush(t *testing.T) {
	for name, c := range map[string]struct {
		bytes func(dst *cache) []byte
		cause string
	}{
		"entry": {func(dst *cache) []byte { return entryFrame(1, dst) }, "an entry for a push"},
		"data":  {func(*cache) []byte { return dataFrame(1, 0, make([]byte, 10), 0) }, "data before its entry"},
	} {
		t.Run(name, func(t *testing.T) {
			check(t)
			s, raw, dst := against(t)
			result := pushing(context.Background(), s, fullPush())
			raw.expect(kindPush, 1)
			raw.write(c.bytes(dst))
			requireStatus(t, receiveFrom(t, result), status.Failed, c.cause)
		})
	}
}

// A stranger's answers count once, and those to nothing not at all.
func TestTheFirstAnswerToAPushCounts(t *testing.T) {
	check(t)
	s, raw, dst := against(t)
	result := pushing(context.Background(), s, fullPush())
	raw.expect(kindPush, 1)
	confirmed := frameOf(header{kind: kindConfirmed, operation: 1}, nil)
	refused := frameOf(header{kind: kindFail, operation: 1, a: uint64(status.ParamInvalid)}, []byte("check\x00no"))
	raw.write(append(append(frameOf(header{kind: kindConfirmed, operation: 9}, nil), refused...), confirmed...))
	requireStatus(t, receiveFrom(t, result), status.ParamInvalid, "receiver: no")
	raw.write(refused)
	requireWorks(t, s, raw, dst)
}

func TestTheEndOfASessionEndsItsPushes(t *testing.T) {
	for name, end := range map[string]func(l *link){
		"the pusher closes":    func(l *link) { l.a.Close(errClosed) },
		"the receiver closes":  func(l *link) { l.b.Close(errClosed) },
		"a connection is lost": func(l *link) { l.a.lanes[0].conn.Shutdown() },
	} {
		t.Run(name, func(t *testing.T) {
			overEach(t, 2, func(t *testing.T, l *link) {
				begun, received := make(chan struct{}), make(chan error, 1)
				l.ownerB.takes(func(ctx context.Context, push *transport.Push) error {
					close(begun)
					err := untilTheEnd(ctx, push)
					received <- err
					return err
				})
				result := pushing(context.Background(), l.a, fullPush())
				receiveFrom(t, begun)
				end(l)
				err := receiveFrom(t, result)
				require.True(t, errors.Is(err, errClosed) || errors.Is(err, status.Failed), "%v", err)
				require.Error(t, receiveFrom(t, received))
				requireStatus(t, l.a.Push(within(t, settleTime), fullPush()), status.NotYetLink, "ended")
				receiveFrom(t, l.a.Idle())
				receiveFrom(t, l.b.Idle())
			})
		})
	}
}

func TestCloseWaitsForWhatIsReceived(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		l := overFabric(t, 1, fabric.Faults{})
		begun, gate := make(chan struct{}), make(chan struct{})
		l.ownerB.takes(func(context.Context, *transport.Push) error {
			close(begun)
			<-gate
			return nil
		})
		result := pushing(context.Background(), l.a, fullPush())
		<-begun
		closed := make(chan struct{})
		go func() {
			defer close(closed)
			l.b.Close(errClosed)
		}()
		synctest.Wait()
		require.False(t, isClosed(closed))
		close(gate)
		<-closed
		requireStatus(t, <-result, status.Failed, "peer died")
	})
}

func TestAPeerHasABoundedNumberOfPushes(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		raw, o, s, _ := newStranger(t, 1)
		o.takes(untilTheEnd)
		for id := range uint64(maxOperations) {
			raw.push(id, time.Hour, fullPush())
		}
		synctest.Wait()
		require.Len(t, s.receipts, maxOperations)
		raw.push(maxOperations, time.Hour, fullPush())
		h, body := raw.expect(kindFail, maxOperations)
		require.EqualValues(t, status.LinkBusy, h.a)
		require.Contains(t, string(body), "more than the owner serves at once")
		raw.send(header{kind: kindCancel, operation: 17}, nil)
		h, _ = raw.expect(kindFail, 17)
		require.EqualValues(t, status.Failed, h.a)
		raw.push(maxOperations, time.Second, fullPush())
		h, _ = raw.expect(kindFail, maxOperations)
		require.EqualValues(t, status.Timeout, h.a, "it has a deadline of its own")
		s.Close(errClosed)
	})
}

func TestAPeersPushesAreBoundedByWhatPullingThemTakes(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		raw, o, s, _ := newStranger(t, 1)
		o.takes(untilTheEnd)
		vast := fullPush()
		vast.Plan.SrcTensors, vast.Shape.Tensors = plan.Range{All: true}, 1<<32-1
		raw.push(1, time.Hour, vast)
		synctest.Wait()
		require.Equal(t, plan.MaxSegments, s.segments)
		raw.push(2, time.Hour, vast)
		h, _ := raw.expect(kindFail, 2)
		require.EqualValues(t, status.LinkBusy, h.a)
		raw.push(3, time.Hour, fullPush())
		synctest.Wait()
		require.Equal(t, plan.MaxSegments+4, s.segments, "two tensors of two blocks")
		raw.send(header{kind: kindCancel, operation: 1}, nil)
		raw.expect(kindFail, 1)
		synctest.Wait()
		require.Equal(t, 4, s.segments)
	})
}
