// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
	"github.com/llm-datadist-open/llm-datadist/core/transport/fabric"
)

// ids returns count numbers below limit without repetition, in a drawn order.
func ids(r *rand.Rand, count, limit int) []uint64 {
	out := make([]uint64, count)
	for i, n := range r.Perm(limit)[:count] {
		out[i] = uint64(n)
	}
	return out
}

// shapes of pulls: each makes two caches and a request between them.
var pulls = []struct {
	name string
	make func(t testing.TB, r *rand.Rand) (src, dst *cache, f *offer, req *transport.Request)
}{
	{"one byte", func(t testing.TB, _ *rand.Rand) (*cache, *cache, *offer, *transport.Request) {
		src, dst := newCache(t, plan.Contiguous, 1, 1, 1), newCache(t, plan.Contiguous, 1, 1, 1)
		return src, dst, &offer{cache: src}, rows(1, dst)
	}},
	{"a row of 8 MiB", func(t testing.TB, _ *rand.Rand) (*cache, *cache, *offer, *transport.Request) {
		src, dst := newCache(t, plan.Contiguous, 2, 2, 4<<20), newCache(t, plan.Contiguous, 2, 3, 4<<20)
		req := rows(1, dst)
		req.Plan.DstBatch = 2
		return src, dst, &offer{cache: src, batch: 1}, req
	}},
	{"part of a row", func(t testing.TB, _ *rand.Rand) (*cache, *cache, *offer, *transport.Request) {
		src, dst := newCache(t, plan.Contiguous, 3, 2, 300_001), newCache(t, plan.Contiguous, 3, 2, 500_000)
		req := rows(1, dst)
		req.Plan.Size = 299_999
		return src, dst, &offer{cache: src, batch: 1}, req
	}},
	{"a range of tensors", func(t testing.TB, _ *rand.Rand) (*cache, *cache, *offer, *transport.Request) {
		src, dst := newCache(t, plan.Contiguous, 8, 1, 100_000), newCache(t, plan.Contiguous, 6, 1, 100_000)
		req := rows(1, dst)
		req.Plan.SrcTensors, req.Plan.DstTensors = plan.Range{First: 4, Count: 3}, plan.Range{First: 1, Count: 3}
		return src, dst, &offer{cache: src}, req
	}},
	{"scattered blocks", func(t testing.TB, r *rand.Rand) (*cache, *cache, *offer, *transport.Request) {
		src, dst := newCache(t, plan.Blocks, 4, 64, 16<<10), newCache(t, plan.Blocks, 4, 64, 16<<10)
		return src, dst, &offer{cache: src}, blocks(1, dst, ids(r, 50, 64), ids(r, 50, 64))
	}},
	{"more pieces of one byte than a call takes", func(t testing.TB, r *rand.Rand) (*cache, *cache, *offer, *transport.Request) {
		src, dst := newCache(t, plan.Blocks, 2, 6000, 1), newCache(t, plan.Blocks, 2, 6000, 1)
		return src, dst, &offer{cache: src}, blocks(1, dst, ids(r, 5000, 6000), ids(r, 5000, 6000))
	}},
	{"many pieces over many frames", func(t testing.TB, r *rand.Rand) (*cache, *cache, *offer, *transport.Request) {
		src, dst := newCache(t, plan.Blocks, 3, 5000, 77), newCache(t, plan.Blocks, 3, 5000, 77)
		return src, dst, &offer{cache: src}, blocks(1, dst, ids(r, 5000, 5000), ids(r, 5000, 5000))
	}},
	{"a row into blocks", func(t testing.TB, r *rand.Rand) (*cache, *cache, *offer, *transport.Request) {
		src, dst := newCache(t, plan.Contiguous, 2, 3, 100_000), newCache(t, plan.Blocks, 2, 40, 4096)
		return src, dst, &offer{cache: src, batch: 2}, blocks(1, dst, nil, ids(r, 25, 40))
	}},
	{"one-sided blocks of a row", func(t testing.TB, r *rand.Rand) (*cache, *cache, *offer, *transport.Request) {
		src, dst := newCache(t, plan.Contiguous, 2, 1, 1<<20), newCache(t, plan.Blocks, 2, 40, 4096)
		req := blocks(1, dst, ids(r, 30, 256), ids(r, 30, 40))
		req.Plan.OneSided = true
		return src, dst, &offer{cache: src}, req
	}},
}

func TestPullDeliversEveryByteAndNoOther(t *testing.T) {
	for _, lanes := range []int{1, 2, 4} {
		t.Run(fmt.Sprintf("%d lanes", lanes), func(t *testing.T) {
			overEach(t, lanes, func(t *testing.T, l *link) {
				for i, c := range pulls {
					r := rand.New(rand.NewPCG(uint64(i), 1))
					src, dst, f, req := c.make(t, r)
					src.randomize(1)
					dst.randomize(2)
					l.ownerB.offer(1, f)
					for range 2 { // the second time with recycled streams and buffers
						want := req.Plan
						want.SrcBatch = f.batch
						expected := dst.after(t, &transport.Request{Plan: want}, src)
						require.NoError(t, l.a.Pull(within(t, settleTime), req, dst.local()), c.name)
						dst.requireContent(t, expected)
						src.randomize(3)
					}
				}
			})
		})
	}
}

func TestPullThroughATornAndJitteryNetwork(t *testing.T) {
	check(t)
	l := overFabric(t, 3, fabric.Faults{Tear: 40_000, Jitter: 2 * time.Millisecond, Buffer: 100_000})
	for i, c := range pulls {
		src, dst, f, req := c.make(t, rand.New(rand.NewPCG(uint64(i), 2)))
		src.randomize(uint64(i))
		l.ownerB.offer(1, f)
		wanted := req.Plan
		wanted.SrcBatch = f.batch
		expected := dst.after(t, &transport.Request{Plan: wanted}, src)
		require.NoError(t, l.a.Pull(within(t, 2*settleTime), req, dst.local()), c.name)
		dst.requireContent(t, expected)
	}
}

func TestSixteenCallersInBothDirections(t *testing.T) {
	overEach(t, 2, func(t *testing.T, l *link) {
		var callers sync.WaitGroup
		for i := range 16 {
			puller, o := l.a, l.ownerB
			if i%2 == 1 {
				puller, o = l.b, l.ownerA
			}
			r := rand.New(rand.NewPCG(uint64(i), 3))
			src, dst := newCache(t, plan.Blocks, 2, 100, 5000+uint64(i)), newCache(t, plan.Blocks, 2, 100, 5000+uint64(i))
			src.randomize(uint64(i))
			o.offer(uint64(i), &offer{cache: src, consumes: false})
			callers.Go(func() {
				for range 10 {
					n := 1 + r.IntN(100)
					req := blocks(uint64(i), dst, ids(r, n, 100), ids(r, n, 100))
					expected := dst.after(t, req, src)
					if err := puller.Pull(within(t, 2*settleTime), req, dst.local()); err != nil {
						t.Error(err)
						return
					}
					dst.requireContent(t, expected)
				}
			})
		}
		callers.Wait()
	})
}

func requireStatus(t testing.TB, err error, code status.Code, cause string) *status.Error {
	t.Helper()
	require.Error(t, err)
	e := status.From(err, "")
	require.Equal(t, code, e.Code, "%v", err)
	require.Contains(t, e.Cause, cause)
	return e
}

func TestRefusalCarriesStageCauseAndHint(t *testing.T) {
	overEach(t, 2, func(t *testing.T, l *link) {
		dst := newCache(t, plan.Contiguous, 1, 1, 100)
		e := requireStatus(t, l.a.Pull(within(t, settleTime), rows(404, dst), dst.local()), status.CacheNotExist, "nobody has it")
		require.Equal(t, status.StageLookup, e.Stage)
		require.Equal(t, "ask somebody else", e.Hint)

		l.ownerB.offer(1, &offer{cache: newCache(t, plan.Contiguous, 1, 1, 50)})
		e = requireStatus(t, l.a.Pull(within(t, settleTime), rows(1, dst), dst.local()), status.ParamInvalid, "larger than the remote row")
		require.Equal(t, status.StageLookup, e.Stage)
	})
}

func TestPullRefusesWhatCanNotBeAsked(t *testing.T) {
	check(t)
	l := loopback(t, 1)
	dst := newCache(t, plan.Blocks, 1, 10, 10)
	many := make([]uint64, maxBody/16)
	requireStatus(t, l.a.Pull(within(t, settleTime), blocks(1, dst, many, many), dst.local()), status.ParamInvalid, "more than a control frame")
	requireStatus(t, l.a.Pull(within(t, settleTime), blocks(1, dst, nil, nil), transport.Local{}), status.ParamInvalid, "0 addresses for 1")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	requireStatus(t, l.a.Pull(ctx, blocks(1, dst, nil, nil), dst.local()), status.Failed, "cancelled")
	require.Empty(t, l.ownerB.all())
}

func TestPullWithTheLargestRequest(t *testing.T) {
	check(t)
	l := loopback(t, 2)
	const count = (maxBody - requestFixed) / 16
	src, dst := newCache(t, plan.Blocks, 1, count, 4), newCache(t, plan.Blocks, 1, count, 4)
	src.randomize(1)
	l.ownerB.offer(1, &offer{cache: src})
	r := rand.New(rand.NewPCG(1, 1))
	req := blocks(1, dst, ids(r, count, count), ids(r, count, count))
	expected := dst.after(t, req, src)
	require.NoError(t, l.a.Pull(within(t, 2*settleTime), req, dst.local()))
	dst.requireContent(t, expected)
}

func TestEndsThatPlanDifferentlyMoveNothing(t *testing.T) {
	for name, spoil := range map[string]func(e *entry){
		"hash":     func(e *entry) { e.hash++ },
		"total":    func(e *entry) { e.total++ },
		"no bytes": func(e *entry) { e.total = 0 },
	} {
		t.Run(name, func(t *testing.T) {
			check(t)
			s, raw, dst := against(t)
			before := dst.content()
			result := pulling(s, within(t, settleTime), rows(1, dst), dst)
			h, _ := raw.next()
			req := rows(1, dst)
			segments, err := plan.Build(&req.Plan, dst.shape, dst.shape, nil)
			require.NoError(t, err)
			e := &entry{shape: dst.shape, total: plan.Total(segments), hash: plan.Hash(&req.Plan, segments)}
			spoil(e)
			body := make([]byte, entryBytes)
			putEntry(body, e)
			raw.send(header{kind: kindEntry, operation: h.operation}, body)
			requireStatus(t, receiveFrom(t, result), status.Failed, "planned differently")
			raw.expect(kindCancel, h.operation)
			raw.data(h.operation, 0, make([]byte, 10), 0)
			requireWorks(t, s, raw, dst)
			dst.requireContent(t, before)
		})
	}
}

// against makes a session whose peer is spoken by hand, and a destination of one row.
func against(t testing.TB) (*Session, *rawPeer, *cache) {
	a, b := loopbackConns(t, 1)
	raw := newRaw(t, b[0])
	s, _ := newSession(t, a, newOwner(t))
	return s, raw, newCache(t, plan.Contiguous, 1, 1, 100_000).randomize(9)
}

// pulling starts a pull.
func pulling(s *Session, ctx context.Context, req *transport.Request, dst *cache) <-chan error {
	result := make(chan error, 1)
	local := dst.local()
	go func() { result <- s.Pull(ctx, req, local) }()
	return result
}

// requireWorks says that the stream is in step: a pull into other memory, served by hand, succeeds.
func requireWorks(t testing.TB, s *Session, raw *rawPeer, like *cache) {
	t.Helper()
	dst := newCache(t, like.shape.Kind, 1, 1, like.shape.Stride)
	result := pulling(s, within(t, settleTime), rows(1, dst), dst)
	h, _ := raw.next()
	for h.kind != kindRequest {
		h, _ = raw.next()
	}
	fresh := newCache(t, like.shape.Kind, 1, 1, like.shape.Stride).randomize(77)
	raw.entry(h.operation, rows(1, dst), dst.shape, false)
	raw.data(h.operation, 0, fresh.tensors[0].Bytes(), 0)
	require.NoError(t, receiveFrom(t, result))
	dst.requireContent(t, fresh.content())
}

func TestSpansOfAStream(t *testing.T) {
	s := &stream{source: true, addrs: []uintptr{1000, 5000}, segments: []plan.Segment{
		{SrcOffset: 0, Bytes: 10}, {SrcOffset: 10, Bytes: 5}, {SrcOffset: 100, Bytes: 1}, {SrcTensor: 1, SrcOffset: 7, Bytes: 20},
	}}
	require.EqualValues(t, 36, s.index())
	spans, covered := s.spans(nil, 10, 3, 33)
	require.EqualValues(t, 33, covered)
	require.Equal(t, []mem.Span{{Addr: 1003, Bytes: 12}, {Addr: 1100, Bytes: 1}, {Addr: 5007, Bytes: 20}}, spans)
	spans, covered = s.spans(spans[:1], 1, 3, 33)
	require.EqualValues(t, 12, covered)
	require.Len(t, spans, 2, "what was there stays, and is not merged with")
}
