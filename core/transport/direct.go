// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"errors"
	"math"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/directory"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// Resolved is what an owner says that a request means.
type Resolved struct {
	Generation uint64
	Shape      plan.Shape
	Batch      uint64 // the batch row
	Whole      bool   // all of that row moves, whatever the request says
	Native     int64  // the cache's name in the owner's vendor's library; 0: it has none there
	// Lease holds the memory where the pull consumes its key, or asks for that; nil otherwise: then nothing is held or has to be ended.
	Lease Lease
}

// Lease is the owner's hold on a cache for one pull of ours. Exactly one of its methods is called, once.
type Lease interface {
	// Confirm says that every byte has arrived, which releases the key, and waits for the answer. It fails where the lease had ended
	// before; where the link or ctx ends first it succeeds, unless the request has asked for the lease: then that is not known to have been
	// good until then.
	Confirm(ctx context.Context) error
	// Abandon gives up: nothing is released.
	Abandon()
}

// Control is what a direct transport asks its peer over, and what serves the peer. A tcp session is one.
type Control interface {
	// Resolve asks the owner what req means. Plan.SrcBatch and Plan.Whole are not filled in.
	Resolve(ctx context.Context, req *Request) (Resolved, error)
	// Unconfirmed returns a channel that is closed when the peer has answered the pushes of ours that have ended without; nil where there
	// are none.
	Unconfirmed() <-chan struct{}
	// Push, Close and Idle are those of Session.
	Push(ctx context.Context, push *Push) error
	Close(cause error)
	Idle() <-chan struct{}
}

// Access says how bytes are to be copied.
type Access struct {
	From directory.Space // whose addresses the sources are
	Into mem.Backing     // what the destinations are made of
}

// Reader reaches the peer's memory without the peer taking part.
type Reader interface {
	// Read copies moves, total bytes together, from the peer's memory (Src) into ours, and has let go of both when it returns. It looks
	// at ctx at least once in 8 MiB. An address of the peer's that can't be read is an error that is unix.EFAULT; memory that can't be
	// reached in this way, or not any more, is one that is ErrNoAccess; where it is the first answer, nothing was copied.
	Read(ctx context.Context, access Access, moves []mem.Move, total uint64) error
}

// ErrNoAccess says that a Reader can't reach a cache's memory. Another way may.
var ErrNoAccess = errors.New("the memory can't be read directly")

// DirectConfig is what a direct transport is made from. Control, Directory and Reader are required.
type DirectConfig struct {
	Control   Control // the transport takes it over
	Directory directory.Reader
	Reader    Reader
	// Stream takes the pulls from memory that is not in the directory or that the Reader has no access to; nil: these fail. It ends with
	// Control, which it may be.
	Stream Session
	// BatchBytes bounds one Read; 0: 1 MiB.
	BatchBytes uint64
	// InlineBytes is up to what size a pull whose key is known is done by Advance, on the goroutine of its caller; 0: none is.
	InlineBytes uint64
}

const (
	// defaultBatchBytes is copied in some 0.1 ms: a cancel is seen soon also by a Reader that doesn't look.
	defaultBatchBytes = 1 << 20
	// maxBatchMoves bounds what one Read is given where segments are small: 1.5 MiB of moves.
	maxBatchMoves = 1 << 16
	// maxTries is how often a pull begins again because its cache was replaced meanwhile. An owner that does so all the time is told from
	// one that has withdrawn the cache by nobody.
	maxTries = 3
	// maxKnown bounds what a link keeps of what it resolved, some 10 KiB and the addresses.
	maxKnown = 128
	// keepSegments bounds what is kept of a plan for the next one: 4 MiB. A larger one is rare and goes to the garbage collector.
	keepSegments = 1 << 16
)

// Direct is the session of a transport whose initiator reads the owner's memory itself. It resolves a key with the owner, plans alone
// with what the owner has published, reads, and looks whether the generation still was live when the last byte had been read: the
// owner takes no part in the copy, so that nobody else could tell.
type Direct struct {
	cfg   DirectConfig
	calls *Calls

	mu    sync.Mutex // guards what follows
	known map[knownKey]found
}

// knownKey is what the owner's answer depends on.
type knownKey struct {
	key                             Key
	oneSided, blocksToBlocks, exact bool
}

// found is what a key means and where that is.
type found struct {
	Resolved
	place directory.Located
}

// NewDirect makes a direct session.
func NewDirect(cfg DirectConfig) *Direct {
	if cfg.BatchBytes == 0 {
		cfg.BatchBytes = defaultBatchBytes
	}
	return &Direct{cfg: cfg, calls: NewCalls(), known: map[knownKey]found{}}
}

// Pull implements Session.
func (d *Direct) Pull(ctx context.Context, req *Request, local Local) error {
	if !req.Theirs() {
		if err := AwaitConfirmed(ctx, d.cfg.Control); err != nil {
			return err
		}
	}
	deadline, _ := ctx.Deadline()
	p, err := d.begin(deadline, req, local)
	if err != nil {
		return err
	}
	return p.Finish(ctx)
}

// Push implements Session: the peer reads our memory, or has us stream it.
func (d *Direct) Push(ctx context.Context, push *Push) error { return d.cfg.Control.Push(ctx, push) }

// AwaitConfirmed waits, before an operation of ours begins, until the peer has answered the pushes that have ended without.
func AwaitConfirmed(ctx context.Context, c interface{ Unconfirmed() <-chan struct{} }) error {
	for waiting := c.Unconfirmed(); waiting != nil; waiting = c.Unconfirmed() {
		select {
		case <-waiting:
		case <-ctx.Done():
			return Ended(ctx)
		}
	}
	return nil
}

// Begin implements Beginner.
func (d *Direct) Begin(deadline time.Time, req *Request, local Local) (Operation, error) {
	if d.cfg.Control.Unconfirmed() != nil {
		return nil, nil
	}
	p, err := d.begin(deadline, req, local)
	if err != nil {
		return nil, err
	}
	return p, nil
}

func (d *Direct) begin(deadline time.Time, req *Request, local Local) (*reading, error) {
	if len(local.Addrs) != int(req.Local.Tensors) {
		return nil, status.Newf(status.ParamInvalid, status.StageCheck, "%d addresses for %d tensors", len(local.Addrs), req.Local.Tensors)
	}
	if err := d.calls.Enter(); err != nil {
		return nil, err
	}
	p := readings.Get().(*reading)
	p.direct, p.req, p.local, p.deadline = d, req, local, deadline
	p.tried, p.ended, p.begun, p.touched, p.err = false, false, false, false, nil
	return p, nil
}

// reading is one pull. It is used again for the next one when it has been finished.
type reading struct {
	direct   *Direct
	req      *Request
	local    Local
	deadline time.Time // zero: none
	limit    time.Time // until when Advance may go on
	tried    bool      // Advance has done what it can
	ended    bool      // with err
	begun    bool      // something was to be read
	touched  bool      // something was read into local memory, of a cache of the shape first
	first    plan.Shape
	streamed Operation // that Advance has begun, of the Stream; then nothing else is done
	err      error

	segments []plan.Segment
	moves    []mem.Move
}

var readings = sync.Pool{New: func() any { return new(reading) }}

// Advance implements Operation: where the link knows what the key means, and it is not too much for a caller who may not be away for
// long, everything is done here. What then can't be read is streamed from here.
func (p *reading) Advance(wait time.Duration) bool {
	if p.streamed != nil {
		return p.streamed.Advance(wait)
	}
	if p.ended || p.tried {
		return p.ended
	}
	p.tried = true
	d := p.direct
	f, ok := d.recall(p.req)
	if !ok || !p.fits(&f) {
		return false
	}
	now := time.Now()
	if p.limit = now.Add(wait); !p.deadline.IsZero() && p.deadline.Before(p.limit) {
		p.limit = p.deadline
	}
	err := p.read((*bounded)(p), &f)
	switch {
	case err == nil:
	case errors.Is(err, ErrNoAccess):
		return p.advanceStream(wait)
	case err == error(errStale):
		return false // the owner has to be asked
	case errors.Is(err, errPaused):
		return false // what was copied is copied again
	}
	p.ended, p.err = true, err
	return true
}

// advanceStream has the owner send what can't be read, as far as that can be begun without waiting.
func (p *reading) advanceStream(wait time.Duration) bool {
	beginner, ok := p.direct.cfg.Stream.(Beginner)
	if !ok || p.touched {
		return false
	}
	var err error
	if p.streamed, err = beginner.Begin(p.deadline, p.req, p.local); err != nil {
		p.ended, p.err = true, p.died(err)
		return true
	}
	return p.streamed != nil && p.streamed.Advance(wait)
}

// fits plans, and says whether the pull is small enough for Advance. A plan that fails is left to Finish, which plans again.
func (p *reading) fits(f *found) bool {
	inline := p.direct.cfg.InlineBytes
	pieces := uint64(len(p.req.Plan.DstBlocks)) * uint64(p.req.Local.Tensors)
	return inline > 0 && pieces <= maxBatchMoves && p.plan(f) == nil && plan.Total(p.segments) <= inline
}

// Finish implements Operation.
func (p *reading) Finish(ctx context.Context) error {
	defer p.direct.calls.Leave() // also where something below panics
	switch {
	case p.streamed != nil:
		p.err = p.died(p.streamed.Finish(ctx))
	case !p.ended:
		p.err = p.finish(ctx)
	}
	err := p.err
	p.recycle()
	return err
}

func (p *reading) recycle() {
	p.direct, p.req, p.local, p.streamed, p.err = nil, nil, Local{}, nil, nil
	if cap(p.segments) <= keepSegments {
		readings.Put(p)
	}
}

func (p *reading) finish(ctx context.Context) error {
	reading, cancel := p.direct.calls.Within(ctx) // the control session ends what waits for it by itself
	defer cancel()
	return p.pull(ctx, reading)
}

var (
	// errStale says that a generation ended before all of it was read.
	errStale = status.New(status.CacheNotExist, status.StageVerify, "the cache was withdrawn during the transfer")
	// errPaused says that Advance has used up its time.
	errPaused = errors.New("paused")
)

// pull resolves and moves. Where the generation ends meanwhile the owner is asked anew: it knows whether the cache is gone, or has been
// replaced. A link that has died in that moment is heard of in the same way.
func (p *reading) pull(ctx, reading context.Context) error {
	d := p.direct
	for try := 0; ; try++ {
		f, err := d.resolve(ctx, p.req)
		if err != nil {
			if errors.Is(err, ErrNoAccess) {
				return p.stream(ctx, err)
			}
			return p.died(err)
		}
		// From another shape other bytes would be written: those that are there already would be left, and be nobody's.
		if p.touched && (f.Shape != p.first || f.Whole != p.req.Plan.Whole) {
			f.abandon()
			return errStale
		}
		if err = p.plan(&f); err == nil {
			err = p.read(reading, &f)
		}
		if err == nil && f.Lease != nil {
			return f.Lease.Confirm(ctx)
		}
		f.abandon()
		if errors.Is(err, ErrNoAccess) {
			return p.stream(ctx, err)
		}
		if err != error(errStale) || try == maxTries {
			return err
		}
	}
}

// died says of a pull that was under way when the link ended why it did; that there is no link is the answer to later ones.
func (p *reading) died(err error) error {
	var cause *status.Error
	if p.begun && status.CodeOf(err) == status.NotYetLink && errors.As(errors.Unwrap(err), &cause) {
		return cause
	}
	return err
}

// stream lets the owner send what can't be read.
func (p *reading) stream(ctx context.Context, why error) error {
	if p.direct.cfg.Stream == nil {
		return status.Newf(status.Failed, status.StageResolve, "%w", why)
	}
	if shaped := len(p.req.Plan.DstBlocks) > 0 && len(p.req.Plan.SrcBlocks) == 0; p.touched && (shaped || p.req.Plan.Whole) {
		return errStale // how much is written depends on a shape that only the owner sees now; see pull
	}
	return p.died(p.direct.cfg.Stream.Pull(ctx, p.req, p.local))
}

func (f *found) abandon() {
	if f.Lease != nil {
		f.Lease.Abandon()
	}
}

// resolve returns what the link knows, or asks the owner. Memory that the owner has not published is ErrNoAccess.
func (d *Direct) resolve(ctx context.Context, req *Request) (found, error) {
	if known, ok := d.recall(req); ok {
		return known, nil
	}
	if f, ok := d.pushed(req); ok {
		return f, nil
	}
	r, err := d.cfg.Control.Resolve(ctx, req)
	if err != nil {
		return found{}, err
	}
	f := found{Resolved: r}
	place, ok := d.cfg.Directory.Lookup(r.Generation)
	switch {
	case !ok && d.cfg.Stream != nil:
		f.abandon()
		return found{}, ErrNoAccess // or withdrawn in this moment, which the owner then says
	case !ok:
		return f, nil // read finds it stale
	case place.Shape != r.Shape || len(place.Addrs) != int(r.Shape.Tensors):
		f.abandon()
		return found{}, status.New(status.Failed, status.StageCheck, "the owner's answer and its directory differ").
			Hinting("run the same version on both ends")
	}
	f.place = place
	if r.Lease == nil {
		d.remember(req, f)
	}
	return f, nil
}

// pushed finds what the peer pushes without asking the peer: its push has said which generation that is.
func (d *Direct) pushed(req *Request) (found, bool) {
	if !req.Theirs() {
		return found{}, false
	}
	place, ok := d.cfg.Directory.Lookup(req.Key.ID)
	if !ok || len(place.Addrs) != int(place.Shape.Tensors) {
		return found{}, false
	}
	f := found{Resolved{Generation: req.Key.ID, Shape: place.Shape, Batch: req.Key.Batch}, place}
	d.remember(req, f)
	return f, true
}

// Close implements Session. Pulls let go within one Read.
func (d *Direct) Close(cause error) { d.calls.Close(cause, d.cfg.Control) }

// Idle implements Session.
func (d *Direct) Idle() <-chan struct{} { return d.calls.Idle(d.cfg.Control) }

// blocksID is the request id that stands for the blocks cache of a model (a BlocksCacheKey).
const blocksID = math.MaxUint64

// keyOf says under which key an answer may be kept, and which name of the cache has to hold on for that. An id is never given again, so
// what it means ends with its generation; the key of a blocks cache can be taken over by another cache, which the directory shows. For
// any other key the owner is asked each time.
func keyOf(req *Request) (knownKey, directory.Name, bool) {
	k := knownKey{key: req.Key, oneSided: req.Plan.OneSided, blocksToBlocks: len(req.Plan.SrcBlocks) > 0, exact: req.Plan.Exact}
	switch {
	case req.Key.Kind == KeyCache && req.Key.CacheID > 0, req.Theirs():
		return k, directory.Name{}, true
	case req.Key.Kind == KeyNormal && req.Key.ID == blocksID:
		return k, directory.Name{ByKey: true, Model: req.Key.Model}, true
	}
	return k, directory.Name{}, false
}

// recall returns what a key was resolved to, where that is still what it means.
func (d *Direct) recall(req *Request) (found, bool) {
	k, name, ok := keyOf(req)
	if !ok {
		return found{}, false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	known, ok := d.known[k]
	if ok && !d.cfg.Directory.Named(known.place.Ref, name) {
		delete(d.known, k)
		return found{}, false
	}
	return known, ok
}

// remember keeps an answer that holds nothing. A cache whose key is consumed by a pull may lose the key, never get one, so that what
// needs no lease now needs none later.
func (d *Direct) remember(req *Request, f found) {
	k, _, ok := keyOf(req)
	if !ok {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.known) >= maxKnown {
		clear(d.known)
	}
	d.known[k] = f
}

// plan lists what is to be copied.
func (p *reading) plan(f *found) (err error) {
	p.req.Plan.SrcBatch, p.req.Plan.Whole = f.Batch, f.Whole
	p.segments, err = plan.Build(&p.req.Plan, f.Shape, p.req.Local, p.segments)
	return err
}

// read copies all segments and looks whether what was read is what was resolved.
func (p *reading) read(ctx context.Context, f *found) error {
	if f.place.Addrs == nil {
		return errStale
	}
	err := p.copy(ctx, f)
	if !p.direct.cfg.Directory.Live(f.place.Ref) {
		return errStale // whatever the copy said: it may have failed because of this
	}
	return err
}

// copy copies all segments, a batch at a time.
func (p *reading) copy(ctx context.Context, f *found) error {
	cfg := &p.direct.cfg
	src, dst := f.place.Addrs, p.local.Addrs
	access := Access{From: f.place.Space, Into: p.local.Backing}
	for next, done := 0, uint64(0); next < len(p.segments); {
		if ctx.Err() != nil {
			return p.stopped(ctx)
		}
		p.moves = p.moves[:0]
		left := cfg.BatchBytes
		for left > 0 && next < len(p.segments) && len(p.moves) < maxBatchMoves {
			g := &p.segments[next]
			m := mem.Move{
				Dst:   dst[g.DstTensor] + uintptr(g.DstOffset+done),
				Src:   src[g.SrcTensor] + uintptr(g.SrcOffset+done),
				Bytes: min(g.Bytes-done, left),
			}
			p.moves = append(p.moves, m)
			left -= m.Bytes
			if done += m.Bytes; done == g.Bytes {
				next, done = next+1, 0
			}
		}
		p.begun = true
		err := cfg.Reader.Read(ctx, access, p.moves, cfg.BatchBytes-left)
		if !p.touched && !errors.Is(err, ErrNoAccess) {
			p.touched, p.first = true, f.Shape
		}
		if err != nil {
			if ctx.Err() != nil {
				return p.stopped(ctx)
			}
			return readFailed(err)
		}
	}
	return nil
}

func readFailed(err error) error {
	var known *status.Error
	switch {
	case errors.Is(err, ErrNoAccess), errors.As(err, &known):
		return err
	case errors.Is(err, unix.EFAULT):
		return status.Newf(status.ParamInvalid, status.StageTransfer, "memory of a cache is not mapped any more: %w", err).
			Hinting("keep registered memory mapped until unregister_cache has returned")
	}
	return status.Newf(status.Failed, status.StageTransfer, "peer died or unlinked: %w", err)
}

// stopped says why ctx has ended.
func (p *reading) stopped(ctx context.Context) error {
	if _, inline := ctx.(*bounded); !inline {
		return Ended(ctx)
	}
	switch {
	case p.direct.calls.life.Err() != nil:
		return Ended(p.direct.calls.life)
	case !p.deadline.IsZero() && !time.Now().Before(p.deadline):
		return deadlinePassed()
	}
	return errPaused
}

// bounded is a reading as the context of its Advance: it ends with the session, or when the time is over. A context of the standard
// library would have to be allocated.
type bounded reading

// Deadline implements context.Context.
func (b *bounded) Deadline() (time.Time, bool) { return b.limit, true }

// Done implements context.Context, as far as it can without a timer: it is closed with the session.
func (b *bounded) Done() <-chan struct{} { return b.direct.calls.life.Done() }

// Err implements context.Context.
func (b *bounded) Err() error {
	if err := b.direct.calls.life.Err(); err != nil {
		return err
	}
	if !time.Now().Before(b.limit) {
		return context.DeadlineExceeded
	}
	return nil
}

// Value implements context.Context.
func (b *bounded) Value(any) any { return nil }

// Ended says what a context's end means for a transfer: the end of the session, a deadline, or a cancel.
func Ended(ctx context.Context) error {
	var known *status.Error
	switch cause := context.Cause(ctx); {
	case errors.As(cause, &known):
		return known
	case errors.Is(cause, context.DeadlineExceeded):
		return deadlinePassed()
	default:
		return status.Newf(status.Failed, status.StageTransfer, "the call was cancelled: %w", cause)
	}
}

func deadlinePassed() error {
	return status.New(status.Timeout, status.StageTransfer, "the deadline has passed").
		Hinting("the link stays usable; raise llm.SyncKvCacheWaitTime or look at the peer")
}
