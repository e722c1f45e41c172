// SPDX-License-Identifier: Apache-2.0

// Package library is a vendor's library for tests, whose objects share a process and find each other by the numbers of their ports. It is
// as narrow as the documented one: a transfer sees what its peer had registered when the first transfer over the link was made, transfers
// over a link take turns, and nothing can be called off. Tests alone import it.
package library

import (
	"fmt"
	"math"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/testkit/device"
	"github.com/llm-datadist-open/llm-datadist/core/transport/native"
)

// Network is where objects find each other.
type Network struct {
	mu      sync.Mutex // guards what follows, and all of its objects but where they say otherwise
	objects map[uint16]*Object
	last    uint16
}

// NewNetwork returns a network without objects.
func NewNetwork() *Network { return &Network{objects: map[uint16]*Object{}} }

// Hook looks at a call, "Register", "Link" or "Pull", before it does anything. An error is what the call then returns.
type Hook func(call string) error

// Object implements native.Library.
type Object struct {
	network *Network
	name    uint64
	port    uint16
	device  *device.Fake
	hook    atomic.Pointer[Hook]
	calls   sync.WaitGroup
	made    atomic.Int64 // links, by this end

	closed bool
	lastID int64
	caches map[int64]*registered
	links  map[uint64]*linked
}

var _ native.Library = (*Object)(nil)

type registered struct {
	shape    plan.Shape
	onDevice bool
	addrs    []uintptr
}

// linked is one end of a link.
type linked struct {
	turn     sync.Mutex // of transfers; not under Network.mu
	broken   *atomic.Bool
	peer     *Object
	snapshot map[int64]*registered // of the peer's caches, at the first transfer
}

// New makes an object whose device memory is on a device.
func (n *Network) New(name uint64, on *device.Fake) *Object {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.last++
	o := &Object{network: n, name: name, port: n.last, device: on, caches: map[int64]*registered{}, links: map[uint64]*linked{}}
	n.objects[o.port] = o
	return o
}

// Open counts the objects that were not closed.
func (n *Network) Open() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.objects)
}

// Interpose sets what looks at each call; nil: nothing.
func (o *Object) Interpose(hook Hook) {
	if hook == nil {
		o.hook.Store(nil)
		return
	}
	o.hook.Store(&hook)
}

// Made counts the links that this end has made.
func (o *Object) Made() int64 { return o.made.Load() }

// Registered counts the caches that are registered.
func (o *Object) Registered() int {
	o.network.mu.Lock()
	defer o.network.mu.Unlock()
	return len(o.caches)
}

// Break has the link to a peer's object fail from now on, at both ends, as a wire that was cut.
func (o *Object) Break(peer uint64) {
	o.network.mu.Lock()
	defer o.network.mu.Unlock()
	if l := o.links[peer]; l != nil {
		l.broken.Store(true)
	}
}

func (o *Object) begin(call string) error {
	if hook := o.hook.Load(); hook != nil {
		return (*hook)(call)
	}
	return nil
}

// Name implements native.Library.
func (o *Object) Name() uint64 { return o.name }

// Port implements native.Library.
func (o *Object) Port() uint16 { return o.port }

// Register implements native.Library.
func (o *Object) Register(shape plan.Shape, onDevice bool, addrs []uintptr) (int64, error) {
	if err := o.begin("Register"); err != nil {
		return 0, err
	}
	o.network.mu.Lock()
	defer o.network.mu.Unlock()
	o.lastID++
	o.caches[o.lastID] = &registered{shape, onDevice, append([]uintptr(nil), addrs...)}
	return o.lastID, nil
}

// Unregister implements native.Library.
func (o *Object) Unregister(id int64) error {
	o.network.mu.Lock()
	defer o.network.mu.Unlock()
	delete(o.caches, id)
	return nil
}

// Link implements native.Library.
func (o *Object) Link(peer uint64, _ netip.Addr, remote netip.AddrPort, _ time.Duration) error {
	if err := o.begin("Link"); err != nil {
		return err
	}
	o.network.mu.Lock()
	defer o.network.mu.Unlock()
	there := o.network.objects[remote.Port()]
	if there == nil || there.name != peer {
		return status.New(status.LinkFailed, status.StageDial, "nobody listens there")
	}
	if l := o.links[peer]; l != nil && !l.broken.Load() {
		return status.New(status.AlreadyLink, status.StageDial, "there is a link")
	}
	if old := there.links[o.name]; old != nil {
		old.broken.Store(true)
	}
	broken := new(atomic.Bool)
	o.links[peer], there.links[o.name] = &linked{peer: there, broken: broken}, &linked{peer: o, broken: broken}
	o.made.Add(1)
	return nil
}

// Unlink implements native.Library.
func (o *Object) Unlink(peer uint64) error {
	o.network.mu.Lock()
	l := o.links[peer]
	delete(o.links, peer)
	o.network.mu.Unlock()
	if l != nil {
		l.broken.Store(true)
		l.turn.Lock() // of the transfer that is under way
		defer l.turn.Unlock()
	}
	return nil
}

// Close implements native.Library.
func (o *Object) Close() error {
	o.calls.Wait()
	o.network.mu.Lock()
	defer o.network.mu.Unlock()
	for _, l := range o.links {
		l.broken.Store(true)
	}
	clear(o.links)
	clear(o.caches)
	o.closed = true
	delete(o.network.objects, o.port)
	return nil
}

// Pull implements native.Library.
func (o *Object) Pull(t *native.Transfer) error {
	l, err := o.enter(t.Peer)
	if err != nil {
		return err
	}
	defer o.calls.Done()
	l.turn.Lock()
	defer l.turn.Unlock()
	if err := o.begin("Pull"); err != nil {
		return err
	}
	src, dst, err := o.ends(l, t)
	if err != nil {
		return err
	}
	pieces, err := piecesOf(t, src.shape, dst.shape)
	if err != nil {
		return err
	}
	if l.broken.Load() {
		return status.New(status.SuspectRemoteError, status.StageTransfer, "the connection is broken")
	}
	return o.copy(l.peer, src, dst, pieces)
}

// enter finds a link and counts a call.
func (o *Object) enter(peer uint64) (*linked, error) {
	o.network.mu.Lock()
	defer o.network.mu.Unlock()
	l := o.links[peer]
	if o.closed || l == nil {
		return nil, status.New(status.NotYetLink, status.StageTransfer, "no such link")
	}
	o.calls.Add(1)
	return l, nil
}

// ends finds the two caches.
func (o *Object) ends(l *linked, t *native.Transfer) (src, dst *registered, err error) {
	o.network.mu.Lock()
	defer o.network.mu.Unlock()
	if l.snapshot == nil {
		l.snapshot = map[int64]*registered{}
		for id, c := range l.peer.caches {
			l.snapshot[id] = c
		}
	}
	src, dst = l.snapshot[t.Remote], o.caches[t.Local]
	if src == nil || dst == nil {
		return nil, nil, status.Newf(status.CacheNotExist, status.StageTransfer, "no cache %d there, or %d here", t.Remote, t.Local)
	}
	return src, dst, nil
}

// piece is a run of bytes from one tensor to another.
type piece struct {
	srcTensor, dstTensor uint32
	src, dst, bytes      uint64
}

func invalid(format string, args ...any) error {
	return status.Newf(status.ParamInvalid, status.StageTransfer, "the vendor's library: "+format, args...)
}

// piecesOf is strict about what the documented calls are.
func piecesOf(t *native.Transfer, src, dst plan.Shape) ([]piece, error) {
	if t.SrcTensors.All != t.DstTensors.All || !t.SrcTensors.Inside(src) || !t.DstTensors.Inside(dst) ||
		t.SrcTensors.Tensors(src) != t.DstTensors.Tensors(dst) {
		return nil, invalid("tensors %+v for %+v", t.SrcTensors, t.DstTensors)
	}
	if t.RemoteRow > math.MaxUint32 || t.LocalRow > math.MaxUint32 {
		return nil, invalid("rows %d and %d", t.RemoteRow, t.LocalRow)
	}
	type run struct{ src, dst, bytes uint64 }
	runs := []run{{t.RemoteRow * dst.Stride, t.LocalRow * dst.Stride, t.Bytes}} // both by the local length, as documented
	if t.SrcBlocks != nil || t.DstBlocks != nil {
		if len(t.SrcBlocks) != len(t.DstBlocks) || src.Stride != dst.Stride || t.RemoteRow != 0 || t.LocalRow != 0 {
			return nil, invalid("%d blocks of %d bytes for %d of %d", len(t.SrcBlocks), src.Stride, len(t.DstBlocks), dst.Stride)
		}
		runs = nil
		for i, from := range t.SrcBlocks {
			runs = append(runs, run{from * src.Stride, t.DstBlocks[i] * dst.Stride, dst.Stride})
		}
	} else if t.Bytes == 0 || t.Bytes > src.Stride || t.Bytes > dst.Stride {
		return nil, invalid("%d bytes of rows of %d and %d", t.Bytes, src.Stride, dst.Stride)
	}
	var pieces []piece
	for k := range uint32(t.SrcTensors.Tensors(src)) {
		for _, r := range runs {
			if r.src+r.bytes > src.TensorBytes || r.dst+r.bytes > dst.TensorBytes {
				return nil, invalid("%+v is outside of tensors of %d and %d bytes", r, src.TensorBytes, dst.TensorBytes)
			}
			pieces = append(pieces, piece{t.SrcTensors.Nth(k, src), t.DstTensors.Nth(k, dst), r.src, r.dst, r.bytes})
		}
	}
	return pieces, nil
}

// copy moves the bytes, as far as there is memory.
func (o *Object) copy(peer *Object, src, dst *registered, pieces []piece) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = status.New(status.ParamInvalid, status.StageTransfer, fmt.Sprint("memory is gone: ", r))
		}
	}()
	for _, p := range pieces {
		from := peer.view(src, p.srcTensor, p.src, p.bytes)
		copy(o.view(dst, p.dstTensor, p.dst, p.bytes), from)
	}
	return nil
}

func (o *Object) view(c *registered, tensor uint32, offset, bytes uint64) []byte {
	at := c.addrs[tensor] + uintptr(offset)
	if c.onDevice {
		return o.device.View(at, bytes)
	}
	return mem.View(at, bytes)
}
