// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

func FuzzParseHeader(f *testing.F) {
	f.Add(frameOf(header{kind: kindData, operation: 1, a: 2, b: 3}, make([]byte, 5)))
	f.Add(frameOf(header{kind: kindFail, flags: 1}, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < headerBytes {
			return
		}
		h, err := parseHeader(b)
		if err != nil {
			return
		}
		require.LessOrEqual(t, h.length, uint32(maxBody))
		again := make([]byte, headerBytes)
		h.put(again)
		back, err := parseHeader(again)
		require.NoError(t, err)
		require.Equal(t, h, back)
	})
}

func FuzzParseRequest(f *testing.F) {
	seed := &transport.Request{Plan: plan.Request{SrcBlocks: []uint64{1, 2}, DstBlocks: []uint64{3, 4}, Size: -1, OneSided: true}}
	b := make([]byte, requestBytes(seed))
	putRequest(b, seed)
	f.Add(b)
	f.Add(lists(0, 0))
	f.Add(lists(1<<31, 1<<31))
	f.Fuzz(func(t *testing.T, b []byte) {
		var req transport.Request
		if parseRequest(b, &req) != nil {
			return
		}
		require.LessOrEqual(t, 8*(len(req.Plan.SrcBlocks)+len(req.Plan.DstBlocks)), len(b))
		again := make([]byte, requestBytes(&req))
		putRequest(again, &req)
		back := transport.Request{Plan: plan.Request{SrcBlocks: make([]uint64, 3), SrcBatch: 9}} // used before
		require.NoError(t, parseRequest(again, &back))
		require.True(t, bytes.Equal(again, put(&back)))
		require.Equal(t, req.Key, back.Key)
		require.Equal(t, req.Local, back.Local)
		require.Zero(t, back.Plan.SrcBatch)
		require.Equal(t, len(b), len(again))
	})
}

func FuzzParsePush(f *testing.F) {
	for _, seed := range []*transport.Push{{}, fullPush()} {
		b := make([]byte, pushBodyBytes(seed))
		putPush(b, seed)
		f.Add(b)
	}
	f.Add(pushLists(1<<63, 0))
	f.Add(pushLists(0, 1<<31))
	f.Fuzz(func(t *testing.T, b []byte) {
		var push transport.Push
		if parsePush(b, &push) != nil {
			return
		}
		require.LessOrEqual(t, 8*(len(push.Addrs)+len(push.Plan.SrcBlocks)+len(push.Plan.DstBlocks)), len(b))
		require.LessOrEqual(t, piecesOf(&push), plan.MaxSegments)
		require.Equal(t, len(b), pushBodyBytes(&push))
		again := make([]byte, len(b))
		putPush(again, &push)
		var back transport.Push
		require.NoError(t, parsePush(again, &back))
		require.Equal(t, push, back)
	})
}

func put(req *transport.Request) []byte {
	b := make([]byte, requestBytes(req))
	putRequest(b, req)
	return b
}

func FuzzStreamSpans(f *testing.F) {
	f.Add([]byte{1, 2, 3, 4, 5, 6}, uint16(1), uint16(7), uint8(2))
	f.Fuzz(func(t *testing.T, b []byte, offset, count uint16, most uint8) {
		s := &stream{source: len(b)%2 == 0, addrs: []uintptr{1 << 20, 2 << 20}}
		var naive []uintptr // address of each byte
		next := uint64(0)
		for _, v := range b {
			g := plan.Segment{Bytes: uint64(v%16) + 1, SrcTensor: uint32(v >> 7), DstTensor: uint32(v >> 7)}
			if v&16 != 0 {
				next += 100 // a gap; without it neighbours touch
			}
			g.SrcOffset, g.DstOffset = next, next
			next += g.Bytes
			s.segments = append(s.segments, g)
			for i := range g.Bytes {
				naive = append(naive, s.addrs[v>>7]+uintptr(g.SrcOffset+i))
			}
		}
		total := s.index()
		require.EqualValues(t, len(naive), total)
		from := min(uint64(offset), total)
		bytes := min(uint64(count), total-from)
		limit := int(most) + 1
		spans, covered := s.spans(nil, limit, from, bytes)
		require.LessOrEqual(t, len(spans), limit)
		require.True(t, covered == bytes || len(spans) == limit && covered < bytes)
		at := from
		for i, span := range spans {
			require.NotZero(t, span.Bytes)
			require.True(t, i == 0 || spans[i-1].Addr+uintptr(spans[i-1].Bytes) != span.Addr, "neighbours are one span")
			for k := range span.Bytes {
				require.Equal(t, naive[at], span.Addr+uintptr(k))
				at++
			}
		}
		require.Equal(t, from+covered, at)
	})
}

// script is a connection on which the peer says what is written down and then closes. What it is told is lost.
type script struct {
	mu   sync.Mutex
	left []byte
	tear *rand.Rand
	down bool
}

func (c *script) Receive(spans []mem.Span) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.left) == 0 || c.down {
		return 0, io.EOF
	}
	most := 1 + c.tear.IntN(len(c.left))
	n := 0
	for _, s := range spans {
		k := copy(mem.View(s.Addr, s.Bytes), c.left[:min(most-n, len(c.left))])
		c.left = c.left[k:]
		if n += k; n == most {
			break
		}
	}
	return n, nil
}

func (c *script) Send(spans []mem.Span) (n int, err error) {
	for _, s := range spans {
		n += int(s.Bytes)
	}
	return n, nil
}

func (c *script) TryReceive(spans []mem.Span) (int, error) { return c.Receive(spans) }
func (c *script) TrySend(spans []mem.Span) (int, error)    { return c.Send(spans) }
func (c *script) Park()                                    {}
func (c *script) Shutdown()                                { c.mu.Lock(); defer c.mu.Unlock(); c.down = true }
func (c *script) Close() error                             { return nil }
func (c *script) Path() string                             { return "script" }

// FuzzSession feeds bytes to a session that has a pull under way and caches to serve. Nothing outside the destination may change.
func FuzzSession(f *testing.F) {
	memory, err := mem.NewBuffer(3 * 4096)
	require.NoError(f, err)
	shape := plan.Shape{Kind: plan.Contiguous, Tensors: 1, TensorBytes: 4096, Stride: 4096, Count: 1}
	dst := &cache{shape: shape, tensors: []*mem.Buffer{memory}}
	good := append(entryFrame(1, dst), dataFrame(1, 0, make([]byte, 4096), 0)...)
	served := frameOf(header{kind: kindRequest, operation: 1, a: 1000}, put(rows(1, dst)))
	f.Add(good, uint64(1))
	f.Add(append(bytes.Clone(served), frameOf(header{kind: kindDone, flags: flagAll, operation: 1}, nil)...), uint64(2))
	f.Add(append(frameOf(header{kind: kindFail, operation: 1, a: 5}, []byte("check\x00no\x00why")), good...), uint64(3))
	f.Add(append(frameOf(header{kind: kindRequest, flags: flagResolve, operation: 1}, put(rows(2, dst))), served...), uint64(4))
	f.Add(pushFrame(5, fullPush()), uint64(5))
	f.Add(append(pushFrame(5, fullPush()), frameOf(header{kind: kindCancel, operation: 5}, nil)...), uint64(6))
	f.Fuzz(func(t *testing.T, b []byte, seed uint64) {
		for i := range memory.Bytes() {
			memory.Bytes()[i] = 0xEE
		}
		o := &owner{caches: map[uint64]*offer{1: {cache: dst}, 2: {cache: dst, consumes: true}}}
		broken := make(chan error, 2)
		conn := &script{left: b, tear: rand.New(rand.NewPCG(seed, 1))}
		o.takes(func(ctx context.Context, _ *transport.Push) error { <-ctx.Done(); return transport.Ended(ctx) })
		s, err := NewSession(Config{Conns: []transport.Conn{hold(conn)}, Owner: o, Receiver: o, Broken: func(err error) { broken <- err }, Spin: -1})
		require.NoError(t, err)
		p, err := s.start(time.Time{}, rows(1, dst), transport.Local{Addrs: []uintptr{memory.Addr() + 4096}}, 0)
		require.NoError(t, err)
		s.cfg.Conns[0].(*held).letGo()
		<-broken
		_ = s.wait(context.Background(), p)
		s.forget(p, p.id)
		s.Close(errClosed)
		o.verify(t)
		require.Empty(t, s.serves)
		require.Empty(t, s.pulls)
		require.Empty(t, s.receipts)
		require.Zero(t, s.segments)
		for i, v := range memory.Bytes() {
			require.True(t, v == 0xEE || i >= 4096 && i < 8192, "byte %d outside the destination has changed", i)
		}
	})
}

// held says nothing before letGo.
type held struct {
	transport.Conn
	gate chan struct{}
}

func hold(c transport.Conn) *held { return &held{c, make(chan struct{})} }

func (h *held) letGo() { close(h.gate) }

func (h *held) TryReceive(spans []mem.Span) (int, error) {
	select {
	case <-h.gate:
		return h.Conn.TryReceive(spans)
	case <-time.After(time.Minute):
		return 0, io.EOF
	}
}
