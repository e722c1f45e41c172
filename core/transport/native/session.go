// SPDX-License-Identifier: Apache-2.0

package native

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// Control is the session over the link's data connections: it resolves keys, serves the peer, and streams what the library can't move.
type Control interface {
	transport.Session
	transport.Control
}

// Config is what a session is made from. All of it is required.
type Config struct {
	Hub     *Hub
	Control Control // the session takes it over, but where NewSession fails
	Device  mem.Device
	Peer    uint64         // the name of the peer's object
	Remote  netip.AddrPort // where that listens
	Local   netip.Addr     // this end of the way there
	// Dials says that this end makes the library's link, as it has dialed ours: the other one may have no way back.
	Dials bool
}

const (
	// defaultLinkTimeout is how long making the library's link may take where the caller has no deadline: the API's own default.
	defaultLinkTimeout = 3 * time.Second
	// askAgainAfter is how long pulls are streamed before a link that could not be made is tried again: each try may take a call's time.
	askAgainAfter = 10 * time.Second
)

// Session is the native transport of one link.
type Session struct {
	cfg   Config
	calls *transport.Calls
	end   *end
	stage *stage // of who has the end's token; nil: none yet
}

// NewSession makes the library's link, where this end does, before deadline (zero: the default).
func NewSession(cfg Config, deadline time.Time) (*Session, error) {
	s := &Session{cfg: cfg, calls: transport.NewCalls(), end: cfg.Hub.join(cfg.Peer)}
	if !cfg.Dials {
		return s, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), defaultLinkTimeout)
	if !deadline.IsZero() {
		cancel()
		ctx, cancel = context.WithDeadline(context.Background(), deadline)
	}
	defer cancel()
	if err := s.Relink(ctx); err != nil {
		s.end.leave(func() {})
		return nil, err
	}
	return s, nil
}

// Close implements transport.Session. Transfers of the library that outlive it keep what they use.
func (s *Session) Close(cause error) {
	s.calls.Close(cause, s.cfg.Control)
	s.end.leave(func() {
		if s.stage != nil {
			s.stage.free(s.cfg.Hub)
			s.stage = nil
		}
	})
}

// Idle implements transport.Session.
func (s *Session) Idle() <-chan struct{} { return s.calls.Idle(s.cfg.Control) }

// Push implements transport.Session: the peer's library pulls.
func (s *Session) Push(ctx context.Context, push *transport.Push) error {
	return s.cfg.Control.Push(ctx, push)
}

// Explain implements transport.Explainer.
func (s *Session) Explain() []string {
	return []string{
		"the vendor's library moves the bytes; its link: " + *s.end.said.Load(),
		"streamed over the data connections: memory that the library has not registered, raw addresses, offsets, blocks of another size",
	}
}

// Pull implements transport.Session. Where the library has not returned in time the destination is detained until it has.
func (s *Session) Pull(ctx context.Context, req *transport.Request, local transport.Local) error {
	if !req.Theirs() {
		if err := transport.AwaitConfirmed(ctx, s.cfg.Control); err != nil {
			return err
		}
	}
	if err := s.calls.Enter(); err != nil {
		return err
	}
	defer s.calls.Leave()
	if !movable(req, local) {
		return s.cfg.Control.Pull(ctx, req, local)
	}
	within, done := s.calls.Within(ctx)
	defer done()
	err := s.pull(within, req, local)
	if errors.Is(err, errUnlinked) {
		return s.cfg.Control.Pull(ctx, req, local)
	}
	return err
}

// errStreamed says that a pull is not one for the library.
var errStreamed = fmt.Errorf("not one for the library: %w", errUnlinked)

// movable says whether a pull can be one of the library's, as far as is known without the owner.
func movable(req *transport.Request, local transport.Local) bool {
	p := &req.Plan
	return local.Memory != nil && local.Memory.Native() > 0 && p.Parts() <= 1 && p.DstBatch <= math.MaxUint32 &&
		(len(p.DstBlocks) > 0 || p.SrcOffset == 0 && p.DstOffset == 0)
}

// pull resolves under a lease, has the library move the bytes, and is told by the owner whether they were the cache's.
func (s *Session) pull(ctx context.Context, req *transport.Request, local transport.Local) error {
	req.Lease = true
	defer func() { req.Lease = false }()
	r, err := s.cfg.Control.Resolve(ctx, req)
	if err != nil {
		return err
	}
	j, err := s.job(req, local, &r)
	if err == nil {
		err = s.move(ctx, j, local.Memory, r.Lease)
	} else {
		r.Lease.Abandon()
	}
	if err != nil {
		return err
	}
	return r.Lease.Confirm(ctx)
}

// job is what the library and, behind it, the device have to do for one pull.
type job struct {
	transfer Transfer
	// Where a row goes into blocks: it is pulled into a stage, and copied from there.
	staged bool
	shape  plan.Shape // of the stage
	moves  []mem.Move // from there; sources are offsets in it
	into   mem.Backing
}

// job says how a pull is made, or errStreamed.
func (s *Session) job(req *transport.Request, local transport.Local, r *transport.Resolved) (*job, error) {
	p := &req.Plan
	p.SrcBatch, p.Whole = r.Batch, r.Whole
	if err := plan.CheckRemote(p, r.Shape, req.Local); err != nil {
		return nil, err
	}
	if r.Native <= 0 || r.Batch > math.MaxUint32 {
		return nil, errStreamed
	}
	j := &job{transfer: Transfer{
		Peer: s.cfg.Peer, Remote: r.Native, Local: local.Memory.Native(), RemoteRow: r.Batch, LocalRow: p.DstBatch,
		SrcTensors: p.SrcTensors, DstTensors: p.DstTensors,
	}}
	t := &j.transfer
	if t.SrcTensors.All != t.DstTensors.All { // the library wants both ranges, or none
		t.SrcTensors, t.DstTensors = spelled(t.SrcTensors, r.Shape), spelled(t.DstTensors, req.Local)
	}
	switch {
	case len(p.SrcBlocks) > 0:
		if r.Shape.Stride != req.Local.Stride {
			return nil, errStreamed
		}
		// Copies, since a call of the library may outlive the caller's, whose lists are used again.
		t.SrcBlocks, t.DstBlocks, t.RemoteRow, t.LocalRow = slices.Clone(p.SrcBlocks), slices.Clone(p.DstBlocks), 0, 0
	case len(p.DstBlocks) > 0:
		return j, s.stageJob(j, req, local, r)
	case p.Whole:
		t.Bytes = r.Shape.Stride
	case p.Size > 0:
		t.Bytes = uint64(p.Size)
	default:
		t.Bytes = req.Local.Stride
	}
	// A one-sided pull may go beyond the first block of a cache of blocks. And the library finds the peer's row by the length of ours.
	if t.Bytes > r.Shape.Stride || r.Batch > 0 && r.Shape.Stride != req.Local.Stride {
		return nil, errStreamed
	}
	return j, nil
}

// spelled is a range with its first tensor and their number.
func spelled(r plan.Range, of plan.Shape) plan.Range {
	if r.All {
		return plan.Range{Count: of.Tensors}
	}
	return r
}

// move has the library do a job, one at a time on each link. It ends when ctx ends; where the library goes on then, the destination is
// detained, and the lease is kept, until it has returned.
func (s *Session) move(ctx context.Context, j *job, destination transport.Memory, lease transport.Lease) error {
	e := s.end
	if err := e.take(ctx); err != nil {
		lease.Abandon()
		return transport.Ended(ctx)
	}
	u := e.hub.begin(func() error {
		defer e.pass()
		return s.perform(ctx, j)
	})
	if !u.returned(ctx) {
		release := destination.Detain()
		e.hub.begin(func() error {
			<-u.done
			release()
			lease.Abandon()
			return nil
		})
		return transport.Ended(ctx)
	}
	if u.err == nil && ctx.Err() == nil {
		return nil
	}
	lease.Abandon()
	if ctx.Err() != nil { // what comes late has failed, and releases no key
		return transport.Ended(ctx)
	}
	return u.err
}

// perform does a job. Called with the token.
func (s *Session) perform(ctx context.Context, j *job) error {
	if !j.staged {
		return s.transfer(ctx, &j.transfer)
	}
	st, err := s.stageOf(j.shape)
	if err != nil {
		return err
	}
	j.transfer.Local = st.id
	if err := s.transfer(ctx, &j.transfer); err != nil {
		return err
	}
	for i := range j.moves {
		j.moves[i].Src += st.memory.Addr()
	}
	if err := mem.CopyBetween(s.cfg.Device, j.moves, j.into, mem.BackingDevice, 1); err != nil {
		return status.From(err, status.StageTransfer)
	}
	return nil
}

// missed says that the library does not find what the lease says is there: its peer's cache, since it knows nothing that was registered after
// the first transfer over their link, or the link, of which the peer may be making another one for that reason.
func missed(err error) bool {
	switch status.CodeOf(err) {
	case status.CacheNotExist, status.NotYetLink, status.SuspectRemoteError:
		return err != nil
	}
	return false
}

// transfer makes one pull of the library's. Where the library misses something the link is made anew, once. Called with the token.
func (s *Session) transfer(ctx context.Context, t *Transfer) error {
	e := s.end
	if e.suspect {
		if err := s.relinkInTime(ctx); err != nil {
			return err
		}
	}
	err := s.cfg.Hub.library.Pull(t)
	if missed(err) {
		if err := s.relinkInTime(ctx); err != nil {
			return err
		}
		err = s.cfg.Hub.library.Pull(t)
	}
	if err == nil {
		e.say("in use")
		return nil
	}
	e.say("its last transfer has failed: " + err.Error())
	switch status.CodeOf(err) {
	// Documented: what has timed out is to be linked anew. And a link whose peer was under suspicion would stay so.
	case status.Timeout, status.WaitTimeout, status.SuspectRemoteError, status.Failed:
		e.suspect = true
	case status.NotYetLink: // of the library's link; ours lives
		e.suspect = true
		return status.Newf(status.Failed, status.StageTransfer, "the vendor's library has lost its link again: %w", err)
	}
	return err
}

// InTime is when to give a link of the library's up, so that something is left of the time until deadline for doing without. Zero is zero.
func InTime(deadline time.Time) time.Time {
	if deadline.IsZero() {
		return deadline
	}
	return deadline.Add(-time.Until(deadline) / 4)
}

// relinkInTime is relink for who can do without.
func (s *Session) relinkInTime(ctx context.Context) error {
	if deadline, ok := ctx.Deadline(); ok {
		within, done := context.WithDeadline(ctx, InTime(deadline))
		defer done()
		ctx = within
	}
	return s.relink(ctx)
}

// Relink implements transport.Relinker.
func (s *Session) Relink(ctx context.Context) error {
	if err := s.calls.Enter(); err != nil {
		return err
	}
	defer s.calls.Leave()
	ctx, done := s.calls.Within(ctx)
	defer done()
	e := s.end
	if err := e.take(ctx); err != nil {
		return transport.Ended(ctx)
	}
	u := e.hub.begin(func() error {
		defer e.pass()
		e.refused = nil // who asks wants it tried
		return s.relink(ctx)
	})
	if !u.returned(ctx) {
		return transport.Ended(ctx)
	}
	return u.err
}

// relink makes the link anew, or has the peer do so where that one dials. Called with the token. Where it can't be had the error is
// errUnlinked, at once for a while.
func (s *Session) relink(ctx context.Context) error {
	e := s.end
	if e.refused != nil && time.Now().Before(e.again) {
		return fmt.Errorf("%w: %w", errUnlinked, e.refused)
	}
	var err error
	if s.cfg.Dials {
		err = s.link(ctx)
	} else {
		err = s.ask(ctx)
	}
	if err != nil {
		e.suspect = true
		if !errors.Is(ctx.Err(), context.Canceled) { // who gave up has not seen that it can't be made
			e.refused, e.again = err, time.Now().Add(askAgainAfter)
		}
		e.say("none: " + err.Error())
		return fmt.Errorf("%w: %w", errUnlinked, err)
	}
	e.suspect, e.refused = false, nil
	e.say("made")
	return nil
}

func (s *Session) link(ctx context.Context) error {
	library := s.cfg.Hub.library
	if err := library.Unlink(s.cfg.Peer); err != nil {
		return err
	}
	timeout := defaultLinkTimeout
	if deadline, ok := ctx.Deadline(); ok {
		timeout = max(time.Millisecond, time.Until(deadline))
	}
	err := library.Link(s.cfg.Peer, s.cfg.Local, s.cfg.Remote, timeout)
	if status.CodeOf(err) == status.AlreadyLink {
		return nil
	}
	return err
}

// ask has the peer make the link.
func (s *Session) ask(ctx context.Context) error {
	return s.cfg.Control.Push(ctx, &transport.Push{
		Key:   transport.Key{Kind: transport.KeyRelink},
		Shape: plan.Shape{Kind: plan.Contiguous, Tensors: 1, TensorBytes: 1, Stride: 1, Count: 1},
		Plan:  plan.Request{SrcTensors: plan.Range{All: true}, DstTensors: plan.Range{All: true}, Size: 1},
	})
}
