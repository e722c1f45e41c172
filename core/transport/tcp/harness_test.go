// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/testkit"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
	"github.com/llm-datadist-open/llm-datadist/core/transport/fabric"
)

// settleTime is how long things that are already on their way may take on a noisy machine.
const settleTime = 10 * time.Second

// kept is memory of caches, which has to outlive the sessions: check frees it at the very end.
var kept struct {
	mu      sync.Mutex
	buffers []*mem.Buffer
}

func keep(b *mem.Buffer) {
	kept.mu.Lock()
	defer kept.mu.Unlock()
	kept.buffers = append(kept.buffers, b)
}

func freeKept() {
	kept.mu.Lock()
	defer kept.mu.Unlock()
	for _, b := range kept.buffers {
		_ = b.Free()
	}
	kept.buffers = nil
}

// made holds the buffers of the package that exist.
var made struct {
	mu      sync.Mutex
	buffers []*mem.Buffer
}

func TestMain(m *testing.M) {
	newBuffer = func(bytes int) (*mem.Buffer, error) {
		b, err := mem.NewBuffer(bytes)
		if err == nil {
			made.mu.Lock()
			made.buffers = append(made.buffers, b)
			made.mu.Unlock()
		}
		return b, err
	}
	os.Exit(m.Run())
}

// check looks, after everything that the test has registered to clean up, for what it left behind: goroutines of this package,
// descriptors, buffers. It comes first in a test.
func check(t testing.TB) {
	t.Helper()
	made.mu.Lock()
	made.buffers = nil
	made.mu.Unlock()
	before := testkit.Files(t) // but for pollers: those of ours are looked at in TestPollerLivesAsLongAsConnections
	t.Cleanup(func() {
		defer freeKept()
		require.EventuallyWithT(t, func(c *assert.CollectT) {
			require.Empty(c, goroutines(), "goroutines are left")
		}, settleTime, time.Millisecond)
		require.Equal(t, before, testkit.Files(t), "descriptors are left")
		made.mu.Lock()
		defer made.mu.Unlock()
		left := 0
		for _, b := range made.buffers {
			if b.Bytes() != nil {
				left++
			}
		}
		require.Zero(t, left, "buffers that were never freed, of %d", len(made.buffers))
	})
}

// goroutines returns the stacks of those that run code of this package outside its tests.
func goroutines() string {
	b := make([]byte, 1<<20)
	b = b[:runtime.Stack(b, true)]
	var left []string
	for _, g := range strings.Split(string(b), "\n\n") {
		if strings.Contains(g, "transport/tcp.(*") && !strings.Contains(g, "tcp.goroutines(") {
			left = append(left, g)
		}
	}
	return strings.Join(left, "\n\n")
}

// cache is memory of one side.
type cache struct {
	shape   plan.Shape
	tensors []*mem.Buffer
}

func newCache(t testing.TB, kind plan.Kind, tensors uint32, count, stride uint64) *cache {
	c := &cache{shape: plan.Shape{Kind: kind, Tensors: tensors, TensorBytes: count * stride, Stride: stride, Count: count}}
	for range tensors {
		b, err := mem.NewBuffer(int(count * stride))
		require.NoError(t, err)
		keep(b)
		c.tensors = append(c.tensors, b)
	}
	return c
}

// randomize fills the cache by seed.
func (c *cache) randomize(seed uint64) *cache {
	for i, b := range c.tensors {
		from := noise()[(seed*7919+uint64(i)*104_729)%1000:]
		for to := b.Bytes(); len(to) > 0; {
			to = to[copy(to, from):]
		}
	}
	return c
}

// noise is a megabyte of random bytes, of a length that no block divides.
var noise = sync.OnceValue(func() []byte {
	b := make([]byte, 1_000_003)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b)
	return b
})

func (c *cache) local() (l transport.Local) {
	for _, b := range c.tensors {
		l.Addrs = append(l.Addrs, b.Addr())
	}
	return l
}

func (c *cache) content() [][]byte {
	var out [][]byte
	for _, b := range c.tensors {
		out = append(out, bytes.Clone(b.Bytes()))
	}
	return out
}

func (c *cache) requireContent(t testing.TB, want [][]byte) {
	t.Helper()
	for i, b := range c.tensors {
		if !bytes.Equal(want[i], b.Bytes()) {
			at := 0
			for want[i][at] == b.Bytes()[at] {
				at++
			}
			require.Failf(t, "wrong bytes", "tensor %d differs first at %d", i, at)
		}
	}
}

// after returns what the cache holds when req has been served from src.
func (c *cache) after(t testing.TB, req *transport.Request, src *cache) [][]byte {
	p := req.Plan
	segments, err := plan.Build(&p, src.shape, c.shape, nil)
	require.NoError(t, err)
	want := c.content()
	for _, g := range segments {
		copy(want[g.DstTensor][g.DstOffset:][:g.Bytes], src.tensors[g.SrcTensor].Bytes()[g.SrcOffset:][:g.Bytes])
	}
	return want
}

// owner is a table of caches by id that records what happens to its sources.
type owner struct {
	mu      sync.Mutex
	caches  map[uint64]*offer
	sources []*source
	receive func(ctx context.Context, push *transport.Push) error // nil: nothing comes
}

// offer is how a cache is offered.
type offer struct {
	*cache
	addrs    []uintptr // in place of the cache's
	batch    uint64
	consumes bool
	native   int64
	whole    bool
	device   bool
	revoked  atomic.Bool
	acquire  func(s *source, n int64) bool // n-th call, from 1; nil: true
}

type source struct {
	offer     *offer
	acquires  atomic.Int64
	held      atomic.Int64
	withdrawn atomic.Bool
	mu        sync.Mutex
	done      []plan.Range
	drops     int
	late      atomic.Int64 // in use after the end
	ended     chan struct{}
}

func newOwner(t testing.TB) *owner {
	o := &owner{caches: map[uint64]*offer{}}
	t.Cleanup(func() { o.verify(t) })
	return o
}

func (o *owner) offer(id uint64, f *offer) { o.mu.Lock(); defer o.mu.Unlock(); o.caches[id] = f }

// verify says that each source ended exactly once and was not used after.
func (o *owner) verify(t testing.TB) {
	for _, s := range o.all() {
		done, drops := s.outcome()
		require.Equal(t, 1, len(done)+drops, "done %d, drops %d", len(done), drops)
		require.Zero(t, s.late.Load(), "in use after its end")
		require.Zero(t, s.held.Load(), "still acquired")
	}
}

func (o *owner) all() []*source {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.sources)
}

func (o *owner) last() *source {
	all := o.all()
	return all[len(all)-1]
}

func (o *owner) Open(req *transport.Request) (transport.Source, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	f := o.caches[req.Key.ID]
	if f == nil {
		return nil, status.New(status.CacheNotExist, status.StageLookup, "nobody has it").Hinting("ask somebody else")
	}
	s := &source{offer: f, ended: make(chan struct{})}
	o.sources = append(o.sources, s)
	return s, nil
}

// takes says what becomes of the peer's pushes.
func (o *owner) takes(receive func(ctx context.Context, push *transport.Push) error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.receive = receive
}

func (o *owner) Receive(ctx context.Context, push *transport.Push) error {
	o.mu.Lock()
	receive := o.receive
	o.mu.Unlock()
	if receive == nil {
		return status.New(status.ParamInvalid, status.StageCheck, "nothing is expected")
	}
	return receive(ctx, push)
}

func (s *source) Shape() plan.Shape  { return s.offer.shape }
func (s *source) Generation() uint64 { return 7 }
func (s *source) Batch() uint64      { return s.offer.batch }
func (s *source) Consumes() bool     { return s.offer.consumes }
func (s *source) Native() int64      { return s.offer.native }
func (s *source) Whole() bool        { return s.offer.whole }
func (s *source) OnDevice() bool     { return s.offer.device }
func (s *source) Address(tensor uint32) uintptr {
	if s.offer.addrs != nil {
		return s.offer.addrs[tensor]
	}
	return s.offer.tensors[tensor].Addr()
}

func (s *source) Acquire() bool {
	n := s.acquires.Add(1)
	select {
	case <-s.ended:
		s.late.Add(1)
	default:
	}
	if s.withdrawn.Load() || s.offer.acquire != nil && !s.offer.acquire(s, n) {
		return false
	}
	s.held.Add(1)
	return true
}

func (s *source) Release() { s.held.Add(-1) }

func (s *source) Done(tensors plan.Range) bool {
	s.end(func() { s.done = append(s.done, tensors) })
	return !s.offer.revoked.Load()
}
func (s *source) Drop() { s.end(func() { s.drops++ }) }

func (s *source) end(record func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	record()
	if s.held.Load() > 0 {
		s.late.Add(1)
	}
	if len(s.done)+s.drops == 1 {
		close(s.ended)
	}
}

func (s *source) dropped() int {
	_, drops := s.outcome()
	return drops
}

func (s *source) outcome() (done []plan.Range, drops int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.done, s.drops
}

// link is two sessions with what they are made of.
type link struct {
	a, b    *Session
	ownerA  *owner
	ownerB  *owner
	brokenA chan error
	brokenB chan error
	net     *fabric.Network // nil over loopback
	hosts   [2]*fabric.Host
}

// overEach runs a test over both kinds of real sockets and over the fabric.
func overEach(t *testing.T, lanes int, test func(t *testing.T, l *link)) {
	t.Run("loopback", func(t *testing.T) { check(t); test(t, loopback(t, lanes)) })
	t.Run("unix", func(t *testing.T) {
		check(t)
		a, b := unixConns(t, lanes)
		test(t, newLink(t, &link{}, a, b))
	})
	t.Run("fabric", func(t *testing.T) { check(t); test(t, overFabric(t, lanes, fabric.Faults{})) })
}

func loopback(t testing.TB, lanes int) *link {
	a, b := loopbackConns(t, lanes)
	return newLink(t, &link{}, a, b)
}

func loopbackConns(t testing.TB, lanes int) (a, b []transport.Conn) {
	return socketConns(t, lanes, "tcp", "127.0.0.1:0", nil)
}

// unixConns are dialed from sockets with names that the kernel found, as core/link does.
func unixConns(t testing.TB, lanes int) (a, b []transport.Conn) {
	return socketConns(t, lanes, "unix", "@llm-datadist-test-"+strconv.FormatUint(rand.Uint64(), 16), func(_, _ string, raw syscall.RawConn) error {
		var failed error
		err := raw.Control(func(fd uintptr) { failed = unix.Bind(int(fd), &unix.SockaddrUnix{}) })
		return errors.Join(err, failed)
	})
}

func socketConns(
	t testing.TB, lanes int, network, address string, control func(network, address string, raw syscall.RawConn) error,
) (a, b []transport.Conn) {
	l, err := net.Listen(network, address)
	require.NoError(t, err)
	defer func() { require.NoError(t, l.Close()) }()
	for range lanes {
		dialed, err := (&net.Dialer{Control: control}).Dial(network, l.Addr().String())
		require.NoError(t, err)
		accepted, err := l.Accept()
		require.NoError(t, err)
		for _, side := range []struct {
			c  net.Conn
			to *[]transport.Conn
		}{{dialed, &a}, {accepted, &b}} {
			conn, err := NewConn(side.c)
			require.NoError(t, err)
			*side.to = append(*side.to, conn)
		}
	}
	return a, b
}

func overFabric(t testing.TB, lanes int, f fabric.Faults) *link {
	l := &link{net: fabric.New(1)}
	l.hosts = [2]*fabric.Host{l.net.Host("a"), l.net.Host("b")}
	a, b := fabricConns(t, l, lanes)
	l.net.SetFaults(f)
	return newLink(t, l, a, b)
}

func fabricConns(t testing.TB, l *link, lanes int) (a, b []transport.Conn) {
	t.Cleanup(l.net.Close)
	listener, err := l.hosts[1].Listen(l.hosts[1].IP() + ":0")
	require.NoError(t, err)
	for range lanes {
		dialed, err := l.hosts[0].Dial(context.Background(), "", listener.Addr().String())
		require.NoError(t, err)
		accepted, err := listener.Accept()
		require.NoError(t, err)
		ca, err := l.hosts[0].Data(dialed)
		require.NoError(t, err)
		cb, err := l.hosts[1].Data(accepted)
		require.NoError(t, err)
		a, b = append(a, ca), append(b, cb)
	}
	require.NoError(t, listener.Close())
	return a, b
}

func newLink(t testing.TB, l *link, a, b []transport.Conn) *link {
	l.ownerA, l.ownerB = newOwner(t), newOwner(t)
	l.a, l.brokenA = newSession(t, a, l.ownerA)
	l.b, l.brokenB = newSession(t, b, l.ownerB)
	return l
}

// errClosed is the cause with which tests close their sessions.
var errClosed = status.New(status.NotYetLink, status.StageClose, "the test is over")

func newSession(t testing.TB, conns []transport.Conn, o *owner) (*Session, chan error) {
	broken := make(chan error, 10)
	s, err := NewSession(Config{Conns: conns, Owner: o, Receiver: o, Spin: -1, Broken: func(cause error) { broken <- cause }})
	require.NoError(t, err)
	t.Cleanup(func() {
		s.Close(errClosed)
		require.LessOrEqual(t, len(broken), 1, "Broken was called more than once")
		require.Empty(t, s.serves)
		require.Empty(t, s.sending)
		require.Empty(t, s.receipts)
		require.Nil(t, s.Unconfirmed())
		require.Zero(t, s.segments)
	})
	return s, broken
}

func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// receiveFrom takes a value that must come soon.
func receiveFrom[T any](t testing.TB, ch <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-ch:
	case <-time.After(settleTime):
		require.Fail(t, "nothing came")
	}
	return v
}

// rows is a pull of one whole batch row of all tensors.
func rows(id uint64, dst *cache) *transport.Request {
	return &transport.Request{
		Key: transport.Key{Kind: transport.KeyNormal, ID: id}, Local: dst.shape,
		Plan: plan.Request{SrcTensors: plan.Range{All: true}, DstTensors: plan.Range{All: true}, Size: -1},
	}
}

// blocks is a pull of blocks of all tensors.
func blocks(id uint64, dst *cache, from, to []uint64) *transport.Request {
	req := rows(id, dst)
	req.Plan.SrcBlocks, req.Plan.DstBlocks = from, to
	return req
}

// hole maps memory with a page in it that nobody may touch.
func hole(t testing.TB, bytes, at int) uintptr {
	b, err := mem.NewBuffer(bytes)
	require.NoError(t, err)
	page := b.Bytes()[at&^(os.Getpagesize()-1):][:os.Getpagesize()]
	require.NoError(t, unix.Mprotect(page, unix.PROT_NONE))
	keep(b)
	return b.Addr()
}

// rawPeer speaks the protocol by hand.
type rawPeer struct {
	t    testing.TB
	conn transport.Conn
	b    *mem.Buffer
}

const rawBytes = maxFrame + 4096

// newStranger makes a session and, at the other end of its one connection, a peer that says what it likes.
func newStranger(t testing.TB, seed uint64) (*rawPeer, *owner, *Session, chan error) {
	l := &link{net: fabric.New(seed)}
	l.hosts = [2]*fabric.Host{l.net.Host("a"), l.net.Host("b")}
	a, b := fabricConns(t, l, 1)
	raw, o := newRaw(t, a[0]), newOwner(t)
	s, broken := newSession(t, b, o)
	return raw, o, s, broken
}

func newRaw(t testing.TB, conn transport.Conn) *rawPeer {
	b, err := mem.NewBuffer(rawBytes)
	require.NoError(t, err)
	t.Cleanup(func() {
		conn.Shutdown()
		_ = conn.Close()
		_ = b.Free()
	})
	return &rawPeer{t, conn, b}
}

// write sends bytes; what the session does not take because it has ended is lost.
func (p *rawPeer) write(data []byte) {
	for len(data) > 0 {
		n := copy(p.b.Bytes(), data)
		n, err := p.conn.Send([]mem.Span{{Addr: p.b.Addr(), Bytes: uint64(n)}})
		if err != nil {
			return
		}
		data = data[n:]
	}
}

func frameOf(h header, body []byte) []byte {
	h.length = uint32(len(body))
	b := make([]byte, headerBytes+len(body))
	h.put(b)
	copy(b[headerBytes:], body)
	return b
}

func (p *rawPeer) send(h header, body []byte) { p.write(frameOf(h, body)) }

// data sends a data frame with a trailer.
func (p *rawPeer) data(operation, offset uint64, body []byte, trailer byte) {
	p.write(dataFrame(operation, offset, body, trailer))
}

func dataFrame(operation, offset uint64, body []byte, trailer byte) []byte {
	return append(frameOf(header{kind: kindData, operation: operation, a: offset}, body), trailer, 0, 0, 0, 0, 0, 0, 0)
}

func (p *rawPeer) request(id uint64, flags uint8, deadline time.Duration, req *transport.Request) {
	body := make([]byte, requestBytes(req))
	putRequest(body, req)
	p.send(header{kind: kindRequest, flags: flags, operation: id, a: deadlineMillis(deadline)}, body)
}

func (p *rawPeer) push(id uint64, deadline time.Duration, what *transport.Push) {
	body := make([]byte, pushBodyBytes(what))
	putPush(body, what)
	p.send(header{kind: kindPush, operation: id, a: deadlineMillis(deadline)}, body)
}

func (p *rawPeer) entry(id uint64, req *transport.Request, src plan.Shape, consumes bool) {
	plans := req.Plan
	segments, err := plan.Build(&plans, src, req.Local, nil)
	require.NoError(p.t, err)
	body := make([]byte, entryBytes)
	putEntry(body, &entry{shape: src, leased: consumes, total: plan.Total(segments), hash: plan.Hash(&plans, segments)})
	p.send(header{kind: kindEntry, operation: id}, body)
}

func (p *rawPeer) read(bytes int) []byte {
	var out []byte
	for began := time.Now(); len(out) < bytes; {
		n, err := p.conn.Receive([]mem.Span{{Addr: p.b.Addr(), Bytes: uint64(bytes - len(out))}})
		require.NoError(p.t, err)
		require.Less(p.t, time.Since(began), settleTime)
		out = append(out, p.b.Bytes()[:n]...)
	}
	return out
}

// next reads a frame; data frames with their trailer.
func (p *rawPeer) next() (header, []byte) {
	h, err := parseHeader(p.read(headerBytes))
	require.NoError(p.t, err)
	bytes := int(h.length)
	if h.kind == kindData {
		bytes += trailerBytes
	}
	return h, p.read(bytes)
}

func (p *rawPeer) expect(kind frameKind, operation uint64) (header, []byte) {
	p.t.Helper()
	h, body := p.next()
	require.Equal(p.t, kind, h.kind)
	require.Equal(p.t, operation, h.operation)
	return h, body
}
