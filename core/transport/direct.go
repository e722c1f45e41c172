// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"errors"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// Resolved is what an owner says that a request means.
type Resolved struct {
	Generation uint64
	Shape      plan.Shape
	Batch      uint64 // the batch row
	// Lease holds the memory where the pull consumes its key; nil otherwise: then nothing is held, and nothing has to be ended.
	Lease Lease
}

// Lease is the owner's hold on a cache for one pull of ours. Exactly one of its methods is called, once.
type Lease interface {
	// Confirm says that every byte has arrived, which releases the key, and waits for the answer. It fails where the lease had ended
	// before; where the link or ctx ends first it succeeds.
	Confirm(ctx context.Context) error
	// Abandon gives up: nothing is released.
	Abandon()
}

// Control is what a direct transport asks its peer over, and what serves the peer. A tcp session is one.
type Control interface {
	// Resolve asks the owner what req means. Plan.SrcBatch is not filled in.
	Resolve(ctx context.Context, req *Request) (Resolved, error)
	// Close and Idle are those of Session.
	Close(cause error)
	Idle() <-chan struct{}
}

// Directory is the peer's directory: see core/directory.
type Directory interface {
	Lookup(generation uint64) (shape plan.Shape, addrs []uintptr, live bool)
	Live(generation uint64) bool
	Named(generation uint64) bool
}

// Reader reaches the peer's memory without the peer taking part.
type Reader interface {
	// Read copies moves from the peer's memory (Src, in the peer's address space) into ours, and has let go of both when it returns.
	// An address of the peer's that it may not or can't read is an error that is unix.EFAULT.
	Read(ctx context.Context, moves []mem.Move) error
}

// DirectConfig is what a direct transport is made from. All but BatchBytes are required.
type DirectConfig struct {
	Control   Control // the transport takes it over
	Directory Directory
	Reader    Reader
	// BatchBytes bounds one Read; 0: 1 MiB. Nothing looks for a cancel while one is under way but the Reader itself.
	BatchBytes uint64
}

const (
	// defaultBatchBytes is copied in some 0.1 ms: a cancel is seen soon.
	defaultBatchBytes = 1 << 20
	// maxBatchMoves bounds what one Read is given where segments are small: what one system call takes.
	maxBatchMoves = mem.MaxSpans
	// maxTries is how often a pull begins again because its cache was replaced meanwhile. An owner that does so all the time is told from
	// one that has withdrawn the cache by nobody.
	maxTries = 3
	// maxKnown bounds what a link keeps of what it resolved, some 10 KiB.
	maxKnown = 128
)

// Direct is the session of a transport whose initiator reads the owner's memory itself. It resolves a key with the owner, plans alone
// with what the owner has answered, reads, and looks whether the generation still was live when the last byte had been read: the
// owner takes no part in the copy, so that nobody else could tell.
type Direct struct {
	cfg     DirectConfig
	life    context.Context // ends with Close, because of its cause
	end     context.CancelCauseFunc
	waiters sync.WaitGroup // goroutines of Idle

	mu    sync.Mutex // guards what follows
	pulls int
	quiet chan struct{} // closed while no pull is under way
	known map[knownKey]Resolved
}

// knownKey is what the owner's answer depends on.
type knownKey struct {
	key                      Key
	oneSided, blocksToBlocks bool
}

// NewDirect makes a direct session.
func NewDirect(cfg DirectConfig) *Direct {
	if cfg.BatchBytes == 0 {
		cfg.BatchBytes = defaultBatchBytes
	}
	d := &Direct{cfg: cfg, quiet: make(chan struct{}), known: map[knownKey]Resolved{}}
	close(d.quiet)
	d.life, d.end = context.WithCancelCause(context.Background())
	return d
}

// Pull implements Session.
func (d *Direct) Pull(ctx context.Context, req *Request, local Local) error {
	if err := d.enter(); err != nil {
		return err
	}
	defer d.leave()
	reading, cancel := context.WithCancelCause(ctx) // the control session ends what waits for it by itself
	defer cancel(nil)
	defer context.AfterFunc(d.life, func() { cancel(context.Cause(d.life)) })()
	return d.pull(ctx, reading, req, local)
}

// errStale says that a generation ended before all of it was read.
var errStale = status.New(status.CacheNotExist, status.StageVerify, "the cache was withdrawn during the transfer")

// pull resolves and moves. Where the generation ends meanwhile the owner is asked anew: it knows whether the cache is gone, or has been
// replaced. A link that has died in that moment is heard of in the same way.
func (d *Direct) pull(ctx, reading context.Context, req *Request, local Local) error {
	var first plan.Shape
	for try := 0; ; try++ {
		r, err := d.resolve(ctx, req)
		if err != nil {
			return err
		}
		// Into another shape other bytes would be written: those that are there already would be left, and be nobody's.
		if try > 0 && r.Shape != first {
			r.abandon()
			return errStale
		}
		first = r.Shape
		err = d.move(reading, req, local, r)
		if err == nil && r.Lease != nil {
			return r.Lease.Confirm(ctx)
		}
		r.abandon()
		if err != error(errStale) || try == maxTries {
			return err
		}
	}
}

func (r *Resolved) abandon() {
	if r.Lease != nil {
		r.Lease.Abandon()
	}
}

// resolve returns what the link knows, or asks the owner.
func (d *Direct) resolve(ctx context.Context, req *Request) (Resolved, error) {
	if known, ok := d.recall(req); ok {
		return known, nil
	}
	r, err := d.cfg.Control.Resolve(ctx, req)
	if err == nil && r.Lease == nil {
		d.remember(req, r)
	}
	return r, err
}

// Close implements Session. Pulls let go within one Read.
func (d *Direct) Close(cause error) {
	d.end(cause)
	d.cfg.Control.Close(cause)
	d.mu.Lock()
	quiet := d.quiet
	d.mu.Unlock()
	<-quiet // and it stays so: nobody enters any more
	d.waiters.Wait()
}

// Idle implements Session.
func (d *Direct) Idle() <-chan struct{} {
	idle := make(chan struct{})
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.life.Err() != nil {
		close(idle)
		return idle
	}
	if d.pulls == 0 {
		return d.cfg.Control.Idle()
	}
	d.waiters.Go(func() {
		defer close(idle)
		d.waitIdle()
	})
	return idle
}

// waitIdle returns when neither we nor the peer have anything under way, or the session ends.
func (d *Direct) waitIdle() {
	for {
		d.mu.Lock()
		quiet := d.quiet
		d.mu.Unlock()
		select {
		case <-quiet:
		case <-d.life.Done():
			return
		}
		select {
		case <-d.cfg.Control.Idle():
		case <-d.life.Done():
			return
		}
		d.mu.Lock()
		still := d.pulls == 0
		d.mu.Unlock()
		if still {
			return
		}
	}
}

func (d *Direct) enter() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.life.Err() != nil {
		return status.Newf(status.NotYetLink, status.StageResolve, "the link has ended: %w", context.Cause(d.life))
	}
	if d.pulls++; d.pulls == 1 {
		d.quiet = make(chan struct{})
	}
	return nil
}

func (d *Direct) leave() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.pulls--; d.pulls == 0 {
		close(d.quiet)
	}
}

// keyOf says under which key an answer may be kept. An id is never given again, so what it means ends with its generation. Other keys
// can be bound anew while the generation that they led to lives on: the owner is asked each time.
func keyOf(req *Request) (knownKey, bool) {
	k := knownKey{key: req.Key, oneSided: req.Plan.OneSided, blocksToBlocks: len(req.Plan.SrcBlocks) > 0}
	return k, req.Key.Kind == KeyCache && req.Key.CacheID > 0
}

// recall returns what a key was resolved to, where that is still what it means.
func (d *Direct) recall(req *Request) (Resolved, bool) {
	k, ok := keyOf(req)
	if !ok {
		return Resolved{}, false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	known, ok := d.known[k]
	if ok && !d.cfg.Directory.Named(known.Generation) {
		delete(d.known, k)
		return Resolved{}, false
	}
	return known, ok
}

// remember keeps an answer that holds nothing. A cache whose key is consumed by a pull may lose the key, never get one, so that what
// needs no lease now needs none later.
func (d *Direct) remember(req *Request, r Resolved) {
	k, ok := keyOf(req)
	if !ok {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.known) >= maxKnown {
		clear(d.known)
	}
	d.known[k] = r
}

// route is what one pull needs to know where its bytes are.
type route struct {
	segments []plan.Segment
	moves    []mem.Move
}

var routes = sync.Pool{New: func() any { return new(route) }}

// keepSegments bounds what the pool keeps of a route: 2.5 MiB. A larger one is rare and goes to the garbage collector.
const keepSegments = 1 << 16

// move plans, reads, and looks whether what was read is what was resolved.
func (d *Direct) move(ctx context.Context, req *Request, local Local, r Resolved) error {
	if len(local.Addrs) != int(req.Local.Tensors) {
		return status.Newf(status.ParamInvalid, status.StageCheck, "%d addresses for %d tensors", len(local.Addrs), req.Local.Tensors)
	}
	shape, addrs, live := d.cfg.Directory.Lookup(r.Generation)
	if !live {
		return errStale
	}
	if shape != r.Shape || len(addrs) != int(shape.Tensors) {
		return status.New(status.Failed, status.StageCheck, "the owner's answer and its directory differ").
			Hinting("run the same version on both ends")
	}
	way := routes.Get().(*route)
	defer way.recycle()
	req.Plan.SrcBatch = r.Batch
	segments, err := plan.Build(&req.Plan, shape, req.Local, way.segments)
	way.segments = segments
	if err != nil {
		return err
	}
	err = d.read(ctx, way, addrs, local.Addrs)
	if !d.cfg.Directory.Live(r.Generation) {
		return errStale // whatever the read said: it may have failed because of this
	}
	return err
}

func (way *route) recycle() {
	if cap(way.segments) <= keepSegments {
		routes.Put(way)
	}
}

// read copies all segments, a batch at a time.
func (d *Direct) read(ctx context.Context, way *route, src, dst []uintptr) error {
	for next, done := 0, uint64(0); next < len(way.segments); {
		if ctx.Err() != nil {
			return Ended(ctx)
		}
		way.moves = way.moves[:0]
		for left := d.cfg.BatchBytes; left > 0 && next < len(way.segments) && len(way.moves) < maxBatchMoves; {
			g := &way.segments[next]
			m := mem.Move{
				Dst:   dst[g.DstTensor] + uintptr(g.DstOffset+done),
				Src:   src[g.SrcTensor] + uintptr(g.SrcOffset+done),
				Bytes: min(g.Bytes-done, left),
			}
			way.moves = append(way.moves, m)
			left -= m.Bytes
			if done += m.Bytes; done == g.Bytes {
				next, done = next+1, 0
			}
		}
		if err := d.cfg.Reader.Read(ctx, way.moves); err != nil {
			return readFailed(ctx, err)
		}
	}
	return nil
}

func readFailed(ctx context.Context, err error) error {
	var known *status.Error
	switch {
	case ctx.Err() != nil:
		return Ended(ctx)
	case errors.As(err, &known):
		return err
	case errors.Is(err, unix.EFAULT):
		return status.Newf(status.ParamInvalid, status.StageTransfer, "memory of a cache is not mapped any more: %w", err).
			Hinting("keep registered memory mapped until unregister_cache has returned")
	}
	return status.Newf(status.Failed, status.StageTransfer, "peer died or unlinked: %w", err)
}

// Ended says what a context's end means for a transfer: the end of the session, a deadline, or a cancel.
func Ended(ctx context.Context) error {
	var known *status.Error
	switch cause := context.Cause(ctx); {
	case errors.As(cause, &known):
		return known
	case errors.Is(cause, context.DeadlineExceeded):
		return status.New(status.Timeout, status.StageTransfer, "the deadline has passed").
			Hinting("the link stays usable; raise llm.SyncKvCacheWaitTime or look at the peer")
	default:
		return status.Newf(status.Failed, status.StageTransfer, "the call was cancelled: %w", cause)
	}
}
