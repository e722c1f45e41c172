// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/cache"
	"github.com/llm-datadist-open/llm-datadist/core/link"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/testkit"
	"github.com/llm-datadist-open/llm-datadist/core/testkit/device"
	"github.com/llm-datadist-open/llm-datadist/core/testkit/library"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
	"github.com/llm-datadist-open/llm-datadist/core/transport/fabric"
	"github.com/llm-datadist-open/llm-datadist/core/transport/native"
	"github.com/llm-datadist-open/llm-datadist/core/transport/tcp"
)

// patient is longer than anything that works takes on a slow machine.
const patient = 30 * time.Second

// way is one way of moving bytes under the engine. The suite runs over each.
type way struct {
	name    string
	fabric  bool // in-memory network, else real sockets
	direct  bool // the puller reads the owner's memory, else both ends take part
	shm     bool // the production path between processes of one host
	back    bool // the loopback fabric: one engine is both ends of each pair
	virtual bool // in a bubble, where time costs nothing
	// Whose caches lie on a device that this process can't touch: those of the engine with cluster id 1, and those of all others.
	first, others bool
	library       bool // a vendor's library moves the bytes between them
}

var (
	overTCP    = way{name: "tcp"}
	overSHM    = way{name: "shm", shm: true}
	overFabric = way{name: "fabric", fabric: true}
	overBubble = way{name: "bubble", fabric: true, virtual: true}
	overDirect = way{name: "direct", fabric: true, direct: true}
	overBack   = way{name: nameLoopback, back: true}
	// directBubble is what runs where a direct transport needs virtual time.
	directBubble = way{name: "direct-bubble", fabric: true, direct: true, virtual: true}

	// Tests whose engines have ids from 1 on have the first one own what the others pull.
	betweenDevices = way{name: "tcp between devices", first: true, others: true}
	fromDevice     = way{name: "tcp from a device", first: true}
	toDevice       = way{name: "tcp to a device", others: true}
	deviceBack     = way{name: nameLoopback + " on a device", back: true, others: true}
	deviceBubble   = way{name: "bubble with devices", fabric: true, virtual: true, first: true, others: true}
)

// overLibrary is the transport cann, with a library that lives in this process.
var overLibrary = way{name: "cann", first: true, others: true, library: true}

var everyWay = []way{overTCP, overSHM, overFabric, overBubble, overDirect, betweenDevices, fromDevice, toDevice, overLibrary}

// alsoBack is for what does not need two tables of caches.
var alsoBack = append([]way{overBack, deviceBack}, everyWay...)

// over runs a test over ways, each in a world of its own, and looks for what it left behind.
func over(t *testing.T, ways []way, run func(w *world)) {
	for _, a := range ways {
		t.Run(a.name, func(t *testing.T) { a.run(t, 1, run) })
	}
}

func (a way) run(t *testing.T, seed uint64, run func(w *world)) {
	check(t)
	body := func(t *testing.T) {
		w := newWorld(t, a, seed)
		defer w.abort()
		run(w)
		w.end()
	}
	if a.virtual {
		synctest.Test(t, body)
	} else {
		body(t)
	}
}

func TestMain(m *testing.M) {
	if os.Getenv(ownerVariable) != "" {
		os.Exit(beOwner())
	}
	// Go's poller opens descriptors at its first use and keeps them.
	if l, err := net.Listen("tcp", "127.0.0.1:0"); err == nil {
		_ = l.Close()
	}
	os.Exit(m.Run())
}

// check fails the test when goroutines, descriptors or mappings are left at its end.
func check(t *testing.T) {
	t.Helper()
	goroutines, files, pools := runtime.NumGoroutine(), testkit.Descriptors(t), testkit.Mappings(t, "llm_datadist pool")
	t.Cleanup(func() {
		if t.Failed() {
			return // it has stopped half-way: what is left says nothing
		}
		require.Eventually(t, func() bool {
			// Eventually runs this on a goroutine of its own.
			return runtime.NumGoroutine() <= goroutines+1 && testkit.Descriptors(t) <= files && testkit.Mappings(t, "llm_datadist pool") <= pools
		}, patient, time.Millisecond, "before: %d goroutines, %d descriptors, %d mappings of pools", goroutines, files, pools)
	})
}

// world is a network and the engines on it.
type world struct {
	t       *testing.T
	way     way
	network *fabric.Network // nil over real sockets
	objects *library.Network

	mu    sync.Mutex // guards what follows
	nodes []*node
	frees []func() error // of the memory that caches were registered with; it outlives the engines
}

func newWorld(t *testing.T, a way, seed uint64) *world {
	w := &world{t: t, way: a, objects: library.NewNetwork()}
	if a.fabric {
		w.network = fabric.New(seed)
	}
	return w
}

// end stops every engine, and checks that nothing is left in it or on the network.
func (w *world) end() {
	for _, n := range w.nodes {
		n.stop()
	}
	if w.network != nil {
		require.Zero(w.t, w.network.Stats().Open, "open connections")
		w.network.Close()
	}
	for _, free := range w.frees {
		require.NoError(w.t, free())
	}
	require.Zero(w.t, w.objects.Open(), "objects of the library")
	for _, n := range w.nodes {
		if n.device != nil {
			require.Zero(w.t, n.device.Held(), "device memory")
		}
	}
}

// abort ends what a test that has failed left running, so that its own words are the last.
func (w *world) abort() {
	for _, n := range w.nodes {
		if !n.stopped {
			_ = n.Close()
		}
	}
}

// eventually waits until done says so.
func (w *world) eventually(done func() bool, why string) {
	w.t.Helper()
	if !w.way.virtual {
		require.Eventually(w.t, done, patient, time.Millisecond, why)
		return
	}
	for range 1000 {
		if synctest.Wait(); done() {
			return
		}
		w.pass(10 * time.Millisecond)
	}
	require.Fail(w.t, "never: "+why)
}

// pass lets virtual time pass. Real time is never waited for: there are events for that.
func (w *world) pass(d time.Duration) {
	require.True(w.t, w.way.virtual)
	time.Sleep(d) // virtual time: this runs in bubbles only
}

// node is one engine, and the host that it lives on.
type node struct {
	*Engine
	w       *world
	id      uint64
	host    *fabric.Host    // nil over real sockets
	device  *device.Fake    // where its caches lie; nil: in host memory
	object  *library.Object // what moves its bytes; nil: none
	address string
	caches  []*memory
	stopped bool

	mu     sync.Mutex // guards what follows
	events []link.Event
}

// hostNetwork is a fabric host as a link.Network, without a proof of a shared host.
type hostNetwork struct{ *fabric.Host }

func (hostNetwork) Prover() link.Prover { return nil }

func poolOf(bytes uint64) *cache.PoolConfig { return &cache.PoolConfig{Bytes: bytes, PageShift: 12} }

// node starts an engine. Over the fabric it lives on the host named name; one that is dead is replaced.
func (w *world) node(name string, id uint64, change ...func(*Options)) *node {
	w.t.Helper()
	n := &node{w: w, id: id}
	options := Options{
		CacheManager: true, SyncTimeout: time.Second, TCPConnections: 2, CopyThreads: 2, PeerDead: patient,
		DevicePool: poolOf(64 << 20), Transport: "tcp", LinkTotal: patient, LinkTries: 1,
	}
	if w.way.shm {
		options.Transport = "shm"
	}
	if w.way.virtual {
		options.PeerDead = 4 * time.Second
	}
	parts := Parts{Device: mem.Host(), Network: TCP(), Event: n.event}
	if id == 1 && w.way.first || id != 1 && w.way.others {
		n.device = device.New()
		parts.Device = n.device
	}
	if w.way.library {
		options.Transport = nameCANN
		parts.Library = func(name uint64) (native.Library, error) {
			n.object = w.objects.New(name, n.device)
			return n.object, nil
		}
	}
	ip := "127.0.0.1"
	if w.way.fabric {
		n.host = w.network.Host(name)
		ip = n.host.IP()
		parts.Network, parts.Sessions = hostNetwork{n.host}, n.session
	}
	for _, f := range change {
		f(&options)
	}
	var err error
	n.Engine, err = New(id, options, parts)
	require.NoError(w.t, err)
	w.mu.Lock()
	w.nodes = append(w.nodes, n)
	w.mu.Unlock()
	// Listening begins when the peers' sessions can find us.
	if options.Directional {
		n.address, err = n.links.Listen(net.JoinHostPort(ip, "0"))
	} else if err = n.SwitchRole(net.JoinHostPort(ip, "0")); err == nil {
		n.address = n.ListenAddress()
	}
	require.NoError(w.t, err)
	return n
}

// session makes the session of a link over the fabric.
func (n *node) session(peer link.Peer, conns []transport.Conn, server transport.Server) (transport.Session, error) {
	session, err := tcp.NewSession(tcp.Config{Conns: conns, Owner: server, Receiver: server, Device: n.parts.Device, Spin: -1, Broken: peer.Fail})
	if err != nil || !n.w.way.direct {
		return session, err
	}
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	for _, other := range n.w.nodes {
		if other.links.Incarnation() == peer.Incarnation {
			return transport.NewDirect(transport.DirectConfig{
				Control: session, Directory: other.table.Directory(), Reader: hostReader{n.host, other.host},
			}), nil
		}
	}
	session.Close(errors.New("no such engine"))
	return nil, errors.New("no such engine")
}

// hostReader reads the memory of a fabric host as shared memory and RDMA do.
type hostReader struct{ own, peer *fabric.Host }

func (r hostReader) Read(_ context.Context, _ transport.Access, moves []mem.Move, _ uint64) error {
	return r.own.ReadDirect(r.peer, moves)
}

func (n *node) event(e link.Event) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.events = append(n.events, e)
}

// told returns what the log was told and forgets it.
func (n *node) told() []link.Event {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := n.events
	n.events = nil
	return out
}

// stop gives every cache back, closes the engine, and checks that both left nothing.
func (n *node) stop() {
	n.w.t.Helper()
	if n.stopped {
		return
	}
	n.stopped = true
	for _, c := range n.caches {
		c.remove()
	}
	require.NoError(n.w.t, n.Close())
	n.requireEmpty()
}

// crash is the death of the process: nobody is told but by the network.
func (n *node) crash() {
	n.w.t.Helper()
	if n.host != nil {
		n.host.Kill()
	}
	n.stopped = true
	if err := n.Close(); err != nil {
		require.NotNil(n.w.t, n.host)
		require.ErrorIs(n.w.t, err, net.ErrClosed, "a dead host's listener is closed already")
	}
	n.w.eventually(func() bool { return n.held() == cache.Stats{} }, "callers who were on their way out let go")
}

func (n *node) requireEmpty() {
	n.w.t.Helper()
	require.Zero(n.w.t, n.held())
}

// held is what the node's table holds.
func (n *node) held() cache.Stats {
	stats := n.Stats()
	stats.Drawn = 0
	return stats
}

func (n *node) cluster() Cluster {
	return Cluster{ID: &n.id, Remote: []string{n.address}, Local: []string{"127.0.0.1"}}
}

func (n *node) tryLink(peer *node) error {
	ctx, cancel := context.WithTimeout(context.Background(), patient)
	defer cancel()
	return n.LinkClusters(ctx, []Cluster{peer.cluster()})[0]
}

func (n *node) link(peer *node) {
	n.w.t.Helper()
	require.NoError(n.w.t, n.tryLink(peer))
}

func (n *node) unlink(peer *node, force bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), patient)
	defer cancel()
	return n.UnlinkClusters(ctx, []Cluster{peer.cluster()}, force)[0]
}

// pair makes an owner and a puller that are linked. The loopback fabric's owner is the puller under another id.
func (w *world) pair(change ...func(*Options)) (owner, puller *node) {
	w.t.Helper()
	if w.way.back {
		puller = w.node("puller", 2, append(change, loopback)...)
		owner = &node{Engine: puller.Engine, w: w, id: 1, device: puller.device, address: "127.0.0.1:1", stopped: true}
		puller.link(owner)
		return owner, puller
	}
	owner, puller = w.node("owner", 1, change...), w.node("puller", 2, change...)
	puller.link(owner)
	return owner, puller
}

func loopback(o *Options) { o.Loopback = true }

// memory is a cache of a node.
type memory struct {
	n     *node
	id    int64
	desc  cache.Desc
	addrs []uintptr
	owned bool
}

func rows(tensors uint32, count, stride int64) cache.Desc {
	return cache.Desc{Kind: plan.Contiguous, Tensors: tensors, Dims: []int64{count, stride}, ElementBytes: 1, Placement: cache.Device}
}

func blocks(tensors uint32, count, stride int64) cache.Desc {
	d := rows(tensors, count, stride)
	d.Kind = plan.Blocks
	return d
}

// register enters memory of the test's own as an accessible cache.
func (n *node) register(desc cache.Desc, keys ...cache.Key) *memory {
	n.w.t.Helper()
	c := n.prepare(desc)
	require.NoError(n.w.t, c.enter(keys...))
	return c
}

// prepare makes memory that enter will register.
func (n *node) prepare(desc cache.Desc) *memory {
	return &memory{n: n, desc: desc, addrs: n.malloc(desc)}
}

func (c *memory) enter(keys ...cache.Key) (err error) {
	if c.id, err = c.n.Register(c.desc, c.addrs, keys, true); err == nil {
		c.n.keep(c)
	}
	return err
}

// malloc obtains memory of a placement for each tensor, as an application does.
func (n *node) malloc(desc cache.Desc) (addrs []uintptr) {
	n.w.t.Helper()
	for range desc.Tensors {
		addr, free := n.obtain(desc.Placement, uint64(desc.Dims[0]*desc.Dims[1]))
		n.w.mu.Lock()
		n.w.frees = append(n.w.frees, free)
		n.w.mu.Unlock()
		addrs = append(addrs, addr)
	}
	return addrs
}

func (n *node) obtain(placement cache.Placement, bytes uint64) (uintptr, func() error) {
	if n.device != nil && placement == cache.Device {
		memory, err := n.device.Reserve(bytes)
		require.NoError(n.w.t, err)
		return memory.Addr(), memory.Close
	}
	b, err := mem.NewBuffer(int(bytes))
	require.NoError(n.w.t, err)
	return b.Addr(), b.Free
}

func (n *node) allocate(desc cache.Desc, keys ...cache.Key) *memory {
	n.w.t.Helper()
	c, err := n.tryAllocate(desc, keys...)
	require.NoError(n.w.t, err)
	return c
}

func (n *node) tryAllocate(desc cache.Desc, keys ...cache.Key) (*memory, error) {
	c := &memory{n: n, desc: desc, owned: true}
	var err error
	if c.id, c.addrs, err = n.Allocate(desc, keys); err != nil {
		return nil, err
	}
	n.keep(c)
	return c, nil
}

func (n *node) keep(c *memory) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.caches = append(n.caches, c)
}

// remove takes a cache off the table with all its keys. Twice is fine.
func (c *memory) remove() {
	c.n.w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patient)
	defer cancel()
	require.NoError(c.n.w.t, c.n.Unregister(ctx, c.id))
}

func (c *memory) tensorBytes() uint64 { return uint64(c.desc.Dims[0] * c.desc.Dims[1]) }

func (c *memory) tensor(i int) []byte {
	if c.n.device != nil && c.desc.Placement == cache.Device {
		return c.n.device.View(c.addrs[i], c.tensorBytes())
	}
	return mem.View(c.addrs[i], c.tensorBytes())
}

// noise is a megabyte of random bytes, of a length that no block divides.
var noise = sync.OnceValue(func() []byte {
	b := make([]byte, 1_000_003)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b)
	return b
})

// fill writes content that is the seed's alone.
func (c *memory) fill(seed uint64) *memory {
	for i := range c.addrs {
		from := noise()[(seed*7919+uint64(i)*104_729)%1000:]
		for to := c.tensor(i); len(to) > 0; {
			to = to[copy(to, from):]
		}
	}
	return c
}

func (c *memory) content() (out [][]byte) {
	for i := range c.addrs {
		out = append(out, bytes.Clone(c.tensor(i)))
	}
	return out
}

func (c *memory) equals(want [][]byte) bool {
	for i := range c.addrs {
		if !bytes.Equal(want[i], c.tensor(i)) {
			return false
		}
	}
	return true
}

func (c *memory) requireContent(want [][]byte) {
	c.n.w.t.Helper()
	for i := range c.addrs {
		got := c.tensor(i)
		for at := range got {
			if got[at] != want[i][at] {
				require.Failf(c.n.w.t, "wrong bytes", "tensor %d of %d bytes differs first at %d", i, len(got), at)
			}
		}
	}
}

// after is what the cache holds when a call has pulled batch row srcBatch of a source with this content: spec §8.5.4, byte by byte.
func (c *memory) after(p plan.Request, source [][]byte, src cache.Desc, srcBatch uint64) [][]byte {
	out := c.content()
	firstSrc, firstDst, count := 0, 0, len(out)
	if !p.SrcTensors.All {
		firstSrc, count = int(p.SrcTensors.First), int(p.SrcTensors.Count)
	}
	if !p.DstTensors.All {
		firstDst, count = int(p.DstTensors.First), int(p.DstTensors.Count)
	}
	srcRow, dstRow := uint64(src.Dims[1]), uint64(c.desc.Dims[1])
	for k := range count {
		from, to := source[firstSrc+k], out[firstDst+k]
		switch {
		case len(p.DstBlocks) == 0:
			size := dstRow
			if p.Size > 0 {
				size = uint64(p.Size)
			}
			copy(to[p.DstBatch*dstRow:], from[srcBatch*srcRow:][:size])
		case len(p.SrcBlocks) > 0:
			for i, d := range p.DstBlocks {
				copy(to[d*dstRow:][:dstRow], from[p.SrcBlocks[i]*dstRow:][:dstRow])
			}
		default:
			row := from[srcBatch*srcRow:][:srcRow]
			for j, d := range p.DstBlocks {
				piece := row[uint64(j)*dstRow:]
				copy(to[d*dstRow:], piece[:min(dstRow, uint64(len(piece)))])
			}
		}
	}
	return out
}

// How keys are named on the wire, and how the owner binds them.
func normal(id uint64) transport.Key { return transport.Key{Kind: transport.KeyNormal, ID: id} }
func prefix(id uint64) transport.Key { return transport.Key{Kind: transport.KeyPrefix, ID: id} }
func blocksKey(model uint64) transport.Key {
	return transport.Key{Kind: transport.KeyNormal, ID: cache.NoID, Model: model}
}
func byID(c *memory, batch uint64) transport.Key {
	return transport.Key{Kind: transport.KeyCache, CacheID: c.id, Batch: batch}
}

// all is a pull of everything there is.
func all() plan.Request {
	return plan.Request{SrcTensors: plan.Range{All: true}, DstTensors: plan.Range{All: true}, Size: -1}
}

func (n *node) pull(from *node, key transport.Key, dst *memory, p plan.Request) error {
	ctx, cancel := context.WithTimeout(context.Background(), patient)
	defer cancel()
	return n.pullWithin(ctx, from, key, dst, p)
}

func (n *node) pullWithin(ctx context.Context, from *node, key transport.Key, dst *memory, p plan.Request) error {
	return n.Pull(ctx, &PullCall{Cluster: from.id, Key: key, Cache: dst.id, Plan: p, TensorsPerLayer: 2})
}

// requireCode checks the code of an error, and that it says why.
func requireCode(t *testing.T, want status.Code, err error) *status.Error {
	t.Helper()
	require.Equal(t, want, status.CodeOf(err), "%v", err)
	if want == status.Success {
		require.NoError(t, err)
		return nil
	}
	e := status.From(err, "")
	require.NotEmpty(t, e.Cause)
	require.NotEmpty(t, e.Stage)
	return e
}

func within(d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), d)
}

// together runs f for 0 to n-1 at once and waits for all.
func together(n int, f func(i int)) {
	var running sync.WaitGroup
	for i := range n {
		running.Go(func() { f(i) })
	}
	running.Wait()
}

// inside is a hook that says which memory is gone.
func inside(addr uintptr, bytes uint64) func(mem.Span) bool {
	return func(s mem.Span) bool { return s.Addr < addr+uintptr(bytes) && s.Addr+uintptr(s.Bytes) > addr }
}
