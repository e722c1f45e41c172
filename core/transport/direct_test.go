// SPDX-License-Identifier: Apache-2.0

package transport_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/directory"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/testkit"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// peer is an owner, its directory and its memory, all made up. Each of its functions may be replaced.
type peer struct {
	mu         sync.Mutex
	shape      plan.Shape
	generation uint64          // what keys lead to
	live       map[uint64]bool // generations whose memory is their own; the value: they have a name
	resolved   int
	consumes   bool
	confirmed  int
	abandoned  int
	confirm    error // what Confirm says
	reads      [][]mem.Move
	read       func(ctx context.Context, moves []mem.Move) error
	closed     []error
	idle       chan struct{}
	model      uint64 // the model whose blocks key leads to the cache
	hidden     bool   // nothing is in the directory
	access     transport.Access
	streamed   int
	stream     error         // what a streamed pull says
	refusal    error         // what Resolve says
	unanswered chan struct{} // what Unconfirmed says
	pushed     []*transport.Push
}

func newPeer(shape plan.Shape) *peer {
	p := &peer{shape: shape, generation: 1, live: map[uint64]bool{1: true}, idle: make(chan struct{})}
	close(p.idle)
	return p
}

func (p *peer) Resolve(ctx context.Context, _ *transport.Request) (transport.Resolved, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.resolved++
	if ctx.Err() != nil {
		return transport.Resolved{}, status.From(ctx.Err(), status.StageResolve)
	}
	if p.refusal != nil {
		return transport.Resolved{}, p.refusal
	}
	if p.generation == 0 {
		return transport.Resolved{}, status.New(status.CacheNotExist, status.StageLookup, "gone")
	}
	r := transport.Resolved{Generation: p.generation, Shape: p.shape, Batch: 1}
	if p.consumes {
		r.Lease = lease{p}
	}
	return r, nil
}

type lease struct{ *peer }

func (l lease) Confirm(context.Context) error { l.confirmed++; return l.confirm }
func (l lease) Abandon()                      { l.abandoned++ }

func (p *peer) Push(_ context.Context, push *transport.Push) error {
	p.pushed = append(p.pushed, push)
	return nil
}

func (p *peer) Unconfirmed() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.unanswered
}

func (p *peer) Close(cause error)     { p.closed = append(p.closed, cause) }
func (p *peer) Idle() <-chan struct{} { return p.idle }

func (p *peer) Lookup(generation uint64) (directory.Located, bool) {
	ref := directory.Ref{Generation: generation}
	if p.hidden || !p.Live(ref) {
		return directory.Located{}, false
	}
	var addrs []uintptr
	for i := range p.shape.Tensors {
		addrs = append(addrs, 1<<40*uintptr(i+1))
	}
	return directory.Located{Ref: ref, Shape: p.shape, Addrs: addrs, Space: directory.Private}, true
}

func (p *peer) Live(ref directory.Ref) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ok := p.live[ref.Generation]
	return ok
}

func (p *peer) Named(ref directory.Ref, name directory.Name) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.live[ref.Generation] && (!name.ByKey || name.Model == p.model)
}

func (p *peer) Read(ctx context.Context, access transport.Access, moves []mem.Move, total uint64) error {
	p.access = access
	var sum uint64
	for _, m := range moves {
		sum += m.Bytes
	}
	if sum != total {
		return errors.New("the total is wrong")
	}
	p.reads = append(p.reads, append([]mem.Move(nil), moves...))
	if p.read != nil {
		return p.read(ctx, moves)
	}
	return nil
}

// Pull makes the peer a session that streams.
func (p *peer) Pull(context.Context, *transport.Request, transport.Local) error {
	p.streamed++
	return p.stream
}

func (p *peer) session() *transport.Direct {
	return transport.NewDirect(transport.DirectConfig{Control: p, Directory: p, Reader: p})
}

var shape = plan.Shape{Kind: plan.Contiguous, Tensors: 2, TensorBytes: 6 << 20, Stride: 3 << 20, Count: 2}

func request(kind transport.KeyKind) (*transport.Request, transport.Local) {
	return &transport.Request{
		Key:   transport.Key{Kind: kind, ID: 5, CacheID: 5, Batch: 1},
		Plan:  plan.Request{SrcTensors: plan.Range{All: true}, DstTensors: plan.Range{All: true}, Size: -1},
		Local: shape,
	}, transport.Local{Addrs: []uintptr{1 << 30, 2 << 30}}
}

func pull(d *transport.Direct, kind transport.KeyKind) error {
	req, local := request(kind)
	return d.Pull(context.Background(), req, local)
}

func TestDirectReadsThePlanInSmallBatches(t *testing.T) {
	p := newPeer(shape)
	require.NoError(t, pull(p.session(), transport.KeyNormal))
	require.Len(t, p.reads, 6)
	at := [2]uintptr{}
	for _, moves := range p.reads {
		var bytes uint64
		for _, m := range moves {
			tensor := m.Src>>40 - 1
			require.Equal(t, 1<<40*(tensor+1)+3<<20+at[tensor], m.Src, "row 1")
			require.Equal(t, 1<<30*(tensor+1)+at[tensor], m.Dst)
			at[tensor] += uintptr(m.Bytes)
			bytes += m.Bytes
		}
		require.LessOrEqual(t, bytes, uint64(1<<20))
	}
	require.Equal(t, [2]uintptr{3 << 20, 3 << 20}, at)
}

func TestDirectBoundsTheMovesOfABatch(t *testing.T) {
	p := newPeer(plan.Shape{Kind: plan.Blocks, Tensors: 1, TensorBytes: 8 * 140_000, Stride: 8, Count: 140_000})
	req, local := request(transport.KeyNormal)
	req.Local, local.Addrs = p.shape, local.Addrs[:1]
	for i := range uint64(70_000) {
		req.Plan.SrcBlocks, req.Plan.DstBlocks = append(req.Plan.SrcBlocks, 2*i), append(req.Plan.DstBlocks, 2*i)
	}
	require.ErrorIs(t, p.session().Pull(context.Background(), req, local), status.CacheNotExist, "blocks have no row 1")
	d := transport.NewDirect(transport.DirectConfig{Control: rowZero{p}, Directory: p, Reader: p})
	require.NoError(t, d.Pull(context.Background(), req, local))
	require.Len(t, p.reads, 2)
	require.Len(t, p.reads[0], 1<<16)
}

// rowZero is a peer whose keys mean row 0.
type rowZero struct{ *peer }

func (r rowZero) Resolve(ctx context.Context, req *transport.Request) (transport.Resolved, error) {
	out, err := r.peer.Resolve(ctx, req)
	out.Batch = 0
	return out, err
}

func TestDirectKeepsWhatAnIDMeansAndNoOtherKey(t *testing.T) {
	p := newPeer(shape)
	d := p.session()
	for range 3 {
		require.NoError(t, pull(d, transport.KeyCache))
	}
	require.Equal(t, 1, p.resolved)
	for range 3 {
		require.NoError(t, pull(d, transport.KeyNormal))
	}
	require.Equal(t, 4, p.resolved, "another cache may have taken the key over")
	p.live[1] = false // withdrawn, and held by somebody's lease
	p.generation = 0
	require.ErrorIs(t, pull(d, transport.KeyCache), status.CacheNotExist)
	require.Equal(t, 5, p.resolved)
}

func TestDirectFindsWhatThePeerPushesWithoutAskingIt(t *testing.T) {
	p := newPeer(shape)
	p.generation, p.live = 5, map[uint64]bool{5: true}
	d := p.session()
	for range 3 {
		require.NoError(t, pull(d, transport.KeyPushed))
	}
	require.Zero(t, p.resolved)
	p.hidden = true
	p.live = map[uint64]bool{}
	require.ErrorIs(t, pull(d, transport.KeyPushed), status.CacheNotExist, "the owner is asked, and what it says is not in the directory")
	require.Positive(t, p.resolved)
}

func TestDirectNeverSucceedsWithAPushedGenerationThatHasEnded(t *testing.T) {
	p := newPeer(shape)
	p.live = map[uint64]bool{5: true}
	p.read = func(context.Context, []mem.Move) error {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.generation, p.live = 0, map[uint64]bool{}
		return nil
	}
	require.ErrorIs(t, pull(p.session(), transport.KeyPushed), status.CacheNotExist)
	require.Equal(t, 1, p.resolved, "the owner has the last word")
}

func TestDirectHandsPushesToItsControlAndWaitsForTheirAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(shape)
		p.live[5] = true
		d := p.session()
		push := &transport.Push{Source: 3}
		require.NoError(t, d.Push(t.Context(), push))
		require.Equal(t, []*transport.Push{push}, p.pushed)

		p.unanswered = make(chan struct{})
		req, local := request(transport.KeyCache)
		operation, err := d.Begin(time.Time{}, req, local)
		require.NoError(t, err)
		require.Nil(t, operation)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.ErrorIs(t, d.Pull(ctx, req, local), status.Timeout)
		require.Empty(t, p.reads)
		require.NoError(t, pull(d, transport.KeyPushed), "the peer's own operation")

		var result error
		done := make(chan struct{})
		go func() {
			defer close(done)
			result = pull(d, transport.KeyCache)
		}()
		synctest.Wait()
		p.mu.Lock()
		close(p.unanswered)
		p.unanswered = nil
		p.mu.Unlock()
		<-done
		require.NoError(t, result)
	})
}

func TestDirectForgetsRatherThanGrow(t *testing.T) {
	p := newPeer(shape)
	d := p.session()
	for batch := range uint64(1000) {
		req, local := request(transport.KeyCache)
		req.Key.Batch = batch
		require.NoError(t, d.Pull(context.Background(), req, local))
	}
	require.NoError(t, pull(d, transport.KeyCache))
	require.Equal(t, 1001, p.resolved)
}

func TestDirectBeginsAgainWhenTheCacheWasReplaced(t *testing.T) {
	for _, when := range []string{"before the read", "during the read"} {
		p := newPeer(shape)
		replace := func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.generation, p.live = 2, map[uint64]bool{2: true}
		}
		if when == "before the read" {
			p.live = map[uint64]bool{}
			resolve := &replacing{peer: p, replace: replace}
			d := transport.NewDirect(transport.DirectConfig{Control: resolve, Directory: p, Reader: p})
			require.NoError(t, pull(d, transport.KeyNormal))
			continue
		}
		p.read = func(context.Context, []mem.Move) error {
			replace()
			p.read = nil
			return unix.EFAULT // the old memory was unmapped
		}
		require.NoError(t, pull(p.session(), transport.KeyNormal))
		require.Equal(t, 2, p.resolved)
	}
}

// replacing is a peer that replaces its cache after it has answered once.
type replacing struct {
	*peer
	replace func()
}

func (r *replacing) Resolve(ctx context.Context, req *transport.Request) (transport.Resolved, error) {
	out, err := r.peer.Resolve(ctx, req)
	r.replace()
	return out, err
}

func TestDirectNeverSucceedsWithAGenerationThatHasEnded(t *testing.T) {
	end := func(p *peer, generation uint64, shape plan.Shape) func(context.Context, []mem.Move) error {
		return func(context.Context, []mem.Move) error {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.live = map[uint64]bool{}
			if p.generation, p.shape = generation, shape; generation > 0 {
				p.live[generation] = true
			}
			return nil
		}
	}
	gone := newPeer(shape)
	gone.read = end(gone, 0, shape)
	require.ErrorIs(t, pull(gone.session(), transport.KeyNormal), status.CacheNotExist)
	require.Equal(t, 2, gone.resolved, "the owner has the last word")

	longer := shape
	longer.Stride, longer.TensorBytes = 4<<20, 8<<20
	reshaped := newPeer(shape)
	reshaped.read = end(reshaped, 2, longer)
	require.ErrorIs(t, pull(reshaped.session(), transport.KeyNormal), status.CacheNotExist)

	restless := newPeer(shape)
	restless.read = func(ctx context.Context, moves []mem.Move) error {
		return end(restless, restless.generation+1, shape)(ctx, moves)
	}
	require.ErrorIs(t, pull(restless.session(), transport.KeyNormal), status.CacheNotExist)
	require.Equal(t, 4, restless.resolved)
}

func TestDirectEndsEachLeaseOnce(t *testing.T) {
	for _, c := range []struct {
		name                 string
		change               func(p *peer, req *transport.Request)
		code                 status.Code
		confirmed, abandoned int
	}{
		{"success", func(*peer, *transport.Request) {}, status.Success, 1, 0},
		{"the lease had ended", func(p *peer, _ *transport.Request) {
			p.confirm = status.New(status.Timeout, status.StageVerify, "late")
		}, status.Timeout, 1, 0},
		{"withdrawn, and held by the lease", func(p *peer, _ *transport.Request) { p.live[1] = false }, status.Success, 1, 0},
		{"the plan fails", func(_ *peer, req *transport.Request) { req.Plan.Size = 4 << 20 }, status.ParamInvalid, 0, 1},
		{"the read fails", func(p *peer, _ *transport.Request) {
			p.read = func(context.Context, []mem.Move) error { return unix.ESRCH }
		}, status.Failed, 0, 1},
		{"unregistered", func(p *peer, _ *transport.Request) { p.live = map[uint64]bool{} }, status.CacheNotExist, 0, 4},
	} {
		p := newPeer(shape)
		p.consumes = true
		req, local := request(transport.KeyCache)
		c.change(p, req)
		require.Equal(t, c.code, status.CodeOf(p.session().Pull(context.Background(), req, local)), c.name)
		require.Equal(t, []int{c.confirmed, c.abandoned}, []int{p.confirmed, p.abandoned}, c.name)
	}
}

func TestDirectErrors(t *testing.T) {
	own := status.New(status.OutOfMemory, status.StageTransfer, "no staging buffer")
	for _, c := range []struct {
		read error
		code status.Code
	}{{unix.EFAULT, status.ParamInvalid}, {unix.ESRCH, status.Failed}, {own, status.OutOfMemory}} {
		p := newPeer(shape)
		p.read = func(context.Context, []mem.Move) error { return c.read }
		err := pull(p.session(), transport.KeyNormal)
		require.ErrorIs(t, err, c.code)
		require.ErrorIs(t, err, c.read)
		require.Len(t, p.reads, 1)
	}
	p := newPeer(shape)
	req, local := request(transport.KeyNormal)
	local.Addrs = local.Addrs[:1]
	require.ErrorIs(t, p.session().Pull(context.Background(), req, local), status.ParamInvalid)
	lying := newPeer(shape)
	d := transport.NewDirect(transport.DirectConfig{Control: rowZero{newPeer(plan.Shape{})}, Directory: lying, Reader: lying})
	require.ErrorIs(t, pull(d, transport.KeyNormal), status.Failed)
}

func TestDirectEndsBetweenBatches(t *testing.T) {
	for _, c := range []struct {
		end  func(cancel context.CancelFunc, d *transport.Direct)
		code status.Code
		text string
	}{
		{func(cancel context.CancelFunc, _ *transport.Direct) { cancel() }, status.Failed, "cancelled"},
		{func(context.CancelFunc, *transport.Direct) {
			time.Sleep(time.Minute) /* virtual time: the deadline passes */
		}, status.Timeout, "deadline"},
		{func(_ context.CancelFunc, d *transport.Direct) {
			go d.Close(status.New(status.Failed, "", "peer died: silent"))
		}, status.Failed, "peer died"},
	} {
		synctest.Test(t, func(t *testing.T) {
			p := newPeer(shape)
			d := p.session()
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			p.read = func(reading context.Context, _ []mem.Move) error {
				c.end(cancel, d)
				<-reading.Done() // the reader is told too
				return nil
			}
			req, local := request(transport.KeyNormal)
			err := d.Pull(ctx, req, local)
			require.ErrorIs(t, err, c.code)
			require.ErrorContains(t, err, c.text)
			require.Len(t, p.reads, 1)
		})
	}
}

func TestDirectCloseWaitsForReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(shape)
		d := p.session()
		letGo := make(chan struct{})
		p.read = func(context.Context, []mem.Move) error { <-letGo; return nil } // a system call that can't be ended
		pulling, closing := make(chan error, 1), make(chan struct{})
		go func() { pulling <- pull(d, transport.KeyNormal) }()
		synctest.Wait()
		cause := status.New(status.Failed, status.StageTransfer, "unlinked")
		go func() {
			defer close(closing)
			d.Close(cause)
		}()
		synctest.Wait()
		select {
		case <-closing:
			require.Fail(t, "closed while a read is under way")
		default:
		}
		close(letGo)
		require.ErrorIs(t, <-pulling, error(cause))
		<-closing
		require.Equal(t, []error{cause}, p.closed)
		err := pull(d, transport.KeyNormal)
		require.ErrorIs(t, err, status.NotYetLink)
		require.ErrorIs(t, errors.Unwrap(err), error(cause))
		d.Close(cause)
	})
}

func TestDirectIsIdleWhenNeitherEndHasAnythingUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(shape)
		d := p.session()
		isIdle := func(c <-chan struct{}) bool {
			synctest.Wait()
			select {
			case <-c:
				return true
			default:
				return false
			}
		}
		require.True(t, isIdle(d.Idle()))
		letGo := make(chan struct{})
		p.read = func(context.Context, []mem.Move) error { <-letGo; return nil }
		pulling := make(chan error, 1)
		go func() { pulling <- pull(d, transport.KeyNormal) }()
		synctest.Wait()
		served := make(chan struct{})
		p.idle = served
		idle := d.Idle()
		require.False(t, isIdle(idle))
		close(letGo)
		require.NoError(t, <-pulling)
		require.False(t, isIdle(idle), "the peer's pulls count too")
		close(served)
		require.True(t, isIdle(idle))

		letGo = make(chan struct{})
		go func() { pulling <- pull(d, transport.KeyNormal) }()
		synctest.Wait()
		idle = d.Idle()
		go d.Close(errors.New("closed"))
		require.True(t, isIdle(idle), "a session that is ending is waited for by nobody")
		close(letGo)
		require.Error(t, <-pulling)
		require.True(t, isIdle(d.Idle()))
	})
}

// blocksRequest is a pull of some blocks by the key of model 3.
func blocksRequest(p *peer) (*transport.Request, transport.Local) {
	p.shape = plan.Shape{Kind: plan.Blocks, Tensors: 2, TensorBytes: 8 << 10, Stride: 1 << 10, Count: 8}
	p.model = 3
	req, local := request(transport.KeyNormal)
	req.Key = transport.Key{Kind: transport.KeyNormal, ID: math.MaxUint64, Model: 3}
	req.Plan.SrcBlocks, req.Plan.DstBlocks, req.Local = []uint64{3, 5}, []uint64{0, 7}, p.shape
	return req, local
}

func TestDirectKeepsABlocksKeyUntilItIsTakenOver(t *testing.T) {
	p := newPeer(shape)
	req, local := blocksRequest(p)
	d := transport.NewDirect(transport.DirectConfig{Control: rowZero{p}, Directory: p, Reader: p})
	for range 3 {
		require.NoError(t, d.Pull(context.Background(), req, local))
	}
	require.Equal(t, 1, p.resolved)
	p.model, p.generation, p.live[2] = 4, 2, true // another cache has the key; the first one lives on under its id
	require.NoError(t, d.Pull(context.Background(), req, local))
	require.Equal(t, 2, p.resolved)
}

func TestDirectStreamsWhatItCanNotRead(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(p *peer)
	}{
		{"not in the directory", func(p *peer) { p.hidden = true }},
		{"no access", func(p *peer) {
			p.read = func(context.Context, []mem.Move) error { return fmt.Errorf("refused: %w", transport.ErrNoAccess) }
		}},
	} {
		p := newPeer(shape)
		p.consumes = true
		c.change(p)
		d := transport.NewDirect(transport.DirectConfig{Control: p, Directory: p, Reader: p, Stream: p})
		require.NoError(t, pull(d, transport.KeyNormal), c.name)
		require.Equal(t, []int{1, 1, 0}, []int{p.streamed, p.abandoned, p.confirmed}, c.name)
		p.stream = status.New(status.CacheNotExist, status.StageLookup, "gone")
		require.ErrorIs(t, pull(d, transport.KeyNormal), status.CacheNotExist, c.name)
		alone := transport.NewDirect(transport.DirectConfig{Control: p, Directory: p, Reader: p})
		require.Error(t, pull(alone, transport.KeyNormal), "%s, and nobody who streams", c.name)
	}
}

// streaming is a peer whose stream can be begun.
type streaming struct {
	*peer
	begun    int
	refuses  error // what Begin says
	unable   bool  // it can't begin without waiting
	advanced int   // calls of Advance; the second one finds the operation ended
}

func (s *streaming) Begin(time.Time, *transport.Request, transport.Local) (transport.Operation, error) {
	s.begun++
	if s.refuses != nil || s.unable {
		return nil, s.refuses
	}
	return s, nil
}

func (s *streaming) Advance(time.Duration) bool {
	s.advanced++
	return s.advanced == 2
}

func (s *streaming) Finish(context.Context) error { return s.stream }

func TestDirectBeginsToStreamInAdvance(t *testing.T) {
	for name, c := range map[string]struct {
		change   func(s *streaming)
		ended    bool // by the first Advance
		begun    int
		streamed int // in Finish
		want     error
	}{
		"it arrives": {change: func(*streaming) {}, begun: 1},
		"it fails": {change: func(s *streaming) { s.stream = status.New(status.CacheNotExist, status.StageLookup, "gone") }, begun: 1,
			want: status.CacheNotExist},
		"it is refused": {change: func(s *streaming) { s.refuses = status.New(status.ParamInvalid, status.StageCheck, "no") }, ended: true,
			begun: 1, want: status.ParamInvalid},
		"it has to wait": {change: func(s *streaming) { s.unable = true }, begun: 1, streamed: 1},
	} {
		t.Run(name, func(t *testing.T) {
			s := &streaming{peer: newPeer(shape)}
			d := transport.NewDirect(transport.DirectConfig{Control: s, Directory: s, Reader: s, Stream: s, InlineBytes: 1 << 30})
			require.NoError(t, pull(d, transport.KeyCache), "what the key means is known now")
			s.read = func(context.Context, []mem.Move) error { return fmt.Errorf("refused: %w", transport.ErrNoAccess) }
			c.change(s)
			req, local := request(transport.KeyCache)
			op := begin(t, d, time.Time{}, req, local)
			require.Equal(t, c.ended, op.Advance(time.Minute))
			if c.begun == 1 && !c.ended && c.streamed == 0 {
				require.True(t, op.Advance(time.Minute))
			}
			if c.want == nil {
				require.NoError(t, op.Finish(context.Background()))
			} else {
				require.ErrorIs(t, op.Finish(context.Background()), c.want)
			}
			require.Equal(t, []int{c.begun, c.streamed}, []int{s.begun, s.streamed})
		})
	}
}

func TestDirectDoesNotBeginToStreamOverWhatItHasRead(t *testing.T) {
	s := &streaming{peer: newPeer(shape)}
	d := transport.NewDirect(transport.DirectConfig{Control: s, Directory: s, Reader: s, Stream: s, InlineBytes: 1 << 30, BatchBytes: 1 << 20})
	require.NoError(t, pull(d, transport.KeyCache))
	first := len(s.reads)
	s.read = func(context.Context, []mem.Move) error {
		if len(s.reads) > first+1 {
			return fmt.Errorf("refused: %w", transport.ErrNoAccess)
		}
		return nil
	}
	req, local := request(transport.KeyCache)
	op := begin(t, d, time.Time{}, req, local)
	require.False(t, op.Advance(time.Minute))
	require.Zero(t, s.begun)
	require.NoError(t, op.Finish(context.Background()))
	require.Equal(t, 1, s.streamed, "every byte anew")
}

// inline is a session over p that makes small pulls at once.
func inline(p *peer) *transport.Direct {
	return transport.NewDirect(transport.DirectConfig{Control: rowZero{p}, Directory: p, Reader: p, InlineBytes: 1 << 20, BatchBytes: 1 << 30})
}

func begin(t *testing.T, d *transport.Direct, deadline time.Time, req *transport.Request, local transport.Local) transport.Operation {
	op, err := d.Begin(deadline, req, local)
	require.NoError(t, err)
	return op
}

func TestDirectAdvancesWhereTheKeyIsKnown(t *testing.T) {
	p := newPeer(shape)
	req, local := blocksRequest(p)
	local.Backing = mem.BackingAnonymous
	d := inline(p)
	op := begin(t, d, time.Time{}, req, local)
	require.False(t, op.Advance(time.Minute), "the owner has to be asked")
	require.False(t, op.Advance(time.Minute))
	require.Empty(t, p.reads)
	require.NoError(t, op.Finish(context.Background()))
	require.Len(t, p.reads, 1)

	op = begin(t, d, time.Now().Add(time.Minute), req, local)
	require.True(t, op.Advance(time.Minute))
	require.True(t, op.Advance(time.Minute))
	require.NoError(t, op.Finish(context.Background()))
	require.Len(t, p.reads, 2)
	require.Equal(t, p.reads[0], p.reads[1])
	require.Equal(t, transport.Access{From: directory.Private, Into: mem.BackingAnonymous}, p.access)
	require.Equal(t, 1, p.resolved)

	req.Plan.Size = 7 // nothing that a pull of blocks has; refused where all checks are
	req.Plan.DstBlocks = []uint64{9, 9}
	op = begin(t, d, time.Time{}, req, local)
	require.False(t, op.Advance(time.Minute))
	require.ErrorIs(t, op.Finish(context.Background()), status.ParamInvalid)
	d.Close(errors.New("closed"))
}

func TestDirectLeavesWhatTakesLongToFinish(t *testing.T) {
	p := newPeer(shape)
	d := inline(p)
	require.NoError(t, pull(d, transport.KeyCache))
	req, local := request(transport.KeyCache)
	op := begin(t, d, time.Time{}, req, local)
	require.False(t, op.Advance(time.Minute), "6 MiB")
	require.Len(t, p.reads, 1)
	require.NoError(t, op.Finish(context.Background()))
	require.Len(t, p.reads, 2)
}

func TestDirectEndsWhileItAdvances(t *testing.T) {
	cause := status.New(status.Failed, status.StageTransfer, "peer died: silent")
	for _, c := range []struct {
		name     string
		deadline time.Duration
		during   func(d *transport.Direct)
		ended    bool
		code     status.Code
	}{
		{"its time is over", time.Hour, func(*transport.Direct) {
			time.Sleep(2 * time.Second) // virtual time
		}, false, status.Success},
		{"the deadline passes", time.Second, func(*transport.Direct) {
			time.Sleep(2 * time.Second) // virtual time
		}, true, status.Timeout},
		{"the session ends", time.Hour, func(d *transport.Direct) {
			go d.Close(cause)
			synctest.Wait()
		}, true, status.Failed},
	} {
		synctest.Test(t, func(t *testing.T) {
			p := newPeer(shape)
			req, local := blocksRequest(p)
			d := inline(p)
			require.NoError(t, d.Pull(context.Background(), req, local))
			p.read = func(ctx context.Context, _ []mem.Move) error {
				p.read = nil
				require.NoError(t, ctx.Err())
				c.during(d)
				require.Error(t, ctx.Err())
				return ctx.Err()
			}
			op := begin(t, d, time.Now().Add(c.deadline), req, local)
			require.Equal(t, c.ended, op.Advance(time.Second), c.name)
			require.Equal(t, c.code, status.CodeOf(op.Finish(context.Background())), c.name)
		})
	}
}

func TestDirectAllocatesNothingForAKnownKey(t *testing.T) {
	if testkit.Raced {
		t.Skip("counts allocations")
	}
	p := newPeer(shape)
	req, local := blocksRequest(p)
	d := transport.NewDirect(transport.DirectConfig{Control: rowZero{p}, Directory: p, Reader: silent{}, InlineBytes: 1 << 20})
	require.NoError(t, d.Pull(context.Background(), req, local))
	deadline := time.Now().Add(time.Hour)
	require.Zero(t, testing.AllocsPerRun(100, func() {
		op, err := d.Begin(deadline, req, local)
		if err != nil || !op.Advance(time.Second) || op.Finish(context.Background()) != nil {
			panic("the pull failed")
		}
	}))
}

// silent reads nothing.
type silent struct{}

func (silent) Read(context.Context, transport.Access, []mem.Move, uint64) error { return nil }

// rowIntoBlocks pulls what the blocks key of model 0 leads to, a row, into blocks: how much is written depends on the row.
func rowIntoBlocks() (*transport.Request, transport.Local) {
	req, local := request(transport.KeyNormal)
	req.Key = transport.Key{Kind: transport.KeyNormal, ID: math.MaxUint64}
	req.Plan.DstBlocks, req.Plan.OneSided = []uint64{0, 1}, true
	req.Local = plan.Shape{Kind: plan.Blocks, Tensors: 1, TensorBytes: 16 << 10, Stride: 4 << 10, Count: 4}
	return req, transport.Local{Addrs: local.Addrs[:1]}
}

func oneRow(bytes uint64) plan.Shape {
	return plan.Shape{Kind: plan.Blocks, Tensors: 1, TensorBytes: bytes, Stride: bytes, Count: 1}
}

// replaceBy makes the first read find its cache replaced by a shorter row.
func (p *peer) replaceBy(hidden bool) {
	p.read = func(context.Context, []mem.Move) error {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.generation, p.live, p.shape, p.hidden = 2, map[uint64]bool{2: true}, oneRow(5<<10), hidden
		return nil
	}
}

func TestDirectDoesNotFinishFromAnotherShapeThanItAdvanced(t *testing.T) {
	p := newPeer(oneRow(8 << 10))
	d := inline(p)
	req, local := rowIntoBlocks()
	require.NoError(t, d.Pull(context.Background(), req, local))
	p.replaceBy(false)
	op := begin(t, d, time.Time{}, req, local)
	require.False(t, op.Advance(time.Minute))
	require.ErrorIs(t, op.Finish(context.Background()), status.CacheNotExist)
	require.NoError(t, d.Pull(context.Background(), req, local), "a new pull takes what is there now")
}

func TestDirectDoesNotStreamOverWhatItHasReadOfAnotherShape(t *testing.T) {
	p := newPeer(oneRow(8 << 10))
	d := transport.NewDirect(transport.DirectConfig{Control: rowZero{p}, Directory: p, Reader: p, Stream: p})
	req, local := rowIntoBlocks()
	p.replaceBy(true)
	require.ErrorIs(t, d.Pull(context.Background(), req, local), status.CacheNotExist)
	require.Zero(t, p.streamed)
	require.NoError(t, d.Pull(context.Background(), req, local))
	require.Equal(t, 1, p.streamed)
}

func TestDirectThatLosesItsPeerSaysWhy(t *testing.T) {
	p := newPeer(shape)
	cause := status.New(status.Failed, status.StageTransfer, "peer died: silent")
	p.read = func(context.Context, []mem.Move) error {
		p.live = map[uint64]bool{}
		p.refusal = status.Newf(status.NotYetLink, status.StageResolve, "the link has ended: %w", cause)
		return nil
	}
	d := p.session()
	require.ErrorIs(t, pull(d, transport.KeyNormal), error(cause), "it was under way")
	require.ErrorIs(t, pull(d, transport.KeyNormal), status.NotYetLink, "it was not")
}
