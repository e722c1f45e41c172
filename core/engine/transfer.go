// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/cache"
	"github.com/llm-datadist-open/llm-datadist/core/link"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// PullCall is one pull_cache or pull_blocks.
type PullCall struct {
	Cluster uint64        // the peer to pull from
	Key     transport.Key // what to pull
	Cache   int64         // id of the local destination
	// Plan says which bytes; its block lists belong to the call until it has returned.
	Plan plan.Request
	// TensorsPerLayer is what Plan's tensor ranges were made with, on each device; looked at where a range is given.
	TensorsPerLayer uint32
}

// Pull copies a peer's cache into a local one. Its deadline is that of ctx; the caller sets it from llm.SyncKvCacheWaitTime.
// The checks are those of spec §8.5.2. When it has returned, nothing of it writes into the destination.
func (e *Engine) Pull(ctx context.Context, call *PullCall) error {
	if ctx.Err() != nil { // a pull that is begun may succeed before anybody looks
		return status.From(transport.Ended(ctx), status.StageTransfer).At(call.Cluster, "")
	}
	deadline, _ := ctx.Deadline()
	p, err := e.BeginPull(deadline, call)
	if err != nil {
		return err
	}
	return p.Finish(ctx)
}

// Pulling is a pull that has passed its checks. Advance may be called, then Finish exactly once, after which it is another pull's.
type Pulling struct {
	engine    *Engine
	cluster   uint64
	use       cache.Use
	link      *link.Link // nil where Finish waits for it
	request   transport.Request
	local     transport.Local
	operation transport.Operation // nil where the transport does all of it in Finish
}

var pullings = sync.Pool{New: func() any { return new(Pulling) }}

// BeginPull makes the checks of a pull and sends its request, where the transport can do so without waiting.
func (e *Engine) BeginPull(deadline time.Time, call *PullCall) (*Pulling, error) {
	p := pullings.Get().(*Pulling)
	p.engine, p.cluster = e, call.Cluster
	if err := e.destination(call, &p.use); err != nil {
		p.recycle()
		return nil, err
	}
	if err := p.begin(deadline, call); err != nil {
		p.use.Release()
		p.recycle()
		return nil, err
	}
	return p, nil
}

func (p *Pulling) recycle() {
	p.engine, p.link, p.operation, p.request, p.local = nil, nil, nil, transport.Request{}, transport.Local{}
	pullings.Put(p)
}

func (p *Pulling) begin(deadline time.Time, call *PullCall) error {
	l, missing := p.engine.linkTo(p.cluster)
	if missing != nil && !p.engine.waitsForLinks() {
		return unlinked(p.cluster, missing)
	}
	backing, err := p.use.Backing()
	if err != nil {
		return err
	}
	entry := p.use.Entry()
	p.request = transport.Request{Key: call.Key, Plan: call.Plan, Local: entry.Shape}
	p.local = transport.Local{Addrs: entry.Addrs, Backing: backing, Memory: &p.use}
	if missing != nil {
		return nil // Finish looks again, and waits
	}
	p.link = l
	beginner, ok := l.Session().(transport.Beginner)
	if !ok {
		return nil
	}
	p.operation, err = beginner.Begin(deadline, &p.request, p.local)
	return p.explained(err)
}

// Advance works on the pull, or waits for it, on the calling goroutine, for about wait at most. True: nothing of it writes into the
// destination any more, and Finish does not wait.
func (p *Pulling) Advance(wait time.Duration) bool {
	return p.operation != nil && p.operation.Advance(wait)
}

// Finish waits for the rest of the pull, which ends when ctx ends, and returns its result.
func (p *Pulling) Finish(ctx context.Context) error {
	defer p.release() // also where the transport panics
	if p.operation != nil {
		return p.explained(p.operation.Finish(ctx))
	}
	if p.link == nil {
		var err error
		if p.link, err = p.engine.linkWithin(ctx, p.cluster); err != nil {
			return unlinked(p.cluster, err)
		}
	}
	return p.explained(p.link.Session().Pull(ctx, &p.request, p.local))
}

func (p *Pulling) release() {
	p.use.Release()
	p.recycle()
}

// unlinked adds which cluster there is no link to.
func unlinked(cluster uint64, err error) error {
	failure := status.From(err, status.StageResolve)
	return failure.At(cluster, failure.Address)
}

func (p *Pulling) explained(err error) error { return explained(p.link, p.cluster, err) }

// explained adds who the peer of a transfer is; nil stays nil.
func explained(l *link.Link, cluster uint64, err error) error {
	if err == nil {
		return nil
	}
	if status.CodeOf(err) == status.NotYetLink {
		// The session has ended since the look-up. The link is to be dead when this call returns: a link_clusters that comes next
		// must not find it alive.
		l.Fail(errors.Unwrap(err))
	}
	return status.From(err, status.StageTransfer).At(cluster, l.Peer().Address)
}

// CheckPull makes the local checks of a pull and moves nothing.
func (e *Engine) CheckPull(call *PullCall) error {
	p := pullings.Get().(*Pulling)
	defer p.recycle()
	if err := e.destination(call, &p.use); err != nil {
		return err
	}
	p.use.Release()
	return nil
}

// destination holds the local cache of a pull in use, when the call fits it.
func (e *Engine) destination(call *PullCall, use *cache.Use) error {
	if e.isOwn(call.Cluster) {
		return status.New(status.ParamInvalid, status.StageCheck, "the own cluster is no source of a pull").At(call.Cluster, "")
	}
	if err := e.table.Hold(call.Cache, use); err != nil {
		return err
	}
	if err := e.checkDestination(use, call); err != nil {
		use.Release()
		return err
	}
	return nil
}

func (e *Engine) checkDestination(use *cache.Use, call *PullCall) error {
	entry := use.Entry()
	ranged := !call.Plan.SrcTensors.All || !call.Plan.DstTensors.All
	if layer := uint64(call.TensorsPerLayer) * uint64(max(1, call.Plan.Parts())); ranged && (layer == 0 || uint64(entry.Shape.Tensors)%layer != 0) {
		return unevenLayers(entry, layer)
	}
	call.Plan.OneSided = e.options.OneSided
	if err := plan.CheckLocal(&call.Plan, entry.Shape); err != nil {
		return err
	}
	if e.options.OneSided && !entry.Accessible {
		return notAccessible(entry)
	}
	return nil
}

// unevenLayers says that a cache's tensors are no multiple of those that make a layer on all devices.
func unevenLayers(local *cache.Entry, layer uint64) error {
	return status.Newf(status.ParamInvalid, status.StageCheck, "the local cache's %d tensors are no multiple of tensor_num_per_layer %d",
		local.Shape.Tensors, layer)
}

func notAccessible(local *cache.Entry) error {
	return status.Newf(status.ParamInvalid, status.StageCheck, "the local cache %d is not remote accessible", local.ID).
		Hinting("register it with remote_accessible=True")
}

// Unregister takes a cache off the table and waits, until ctx ends, for this engine's own operations on its memory. Unknown ids are
// fine. Peers that are pulling from it get CacheNotExist.
func (e *Engine) Unregister(ctx context.Context, id int64) error { return e.table.Unregister(ctx, id) }
