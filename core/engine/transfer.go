// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
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
	// TensorsPerLayer is what Plan's tensor ranges were made with; looked at where a range is given.
	TensorsPerLayer uint32
}

// Pull copies a peer's cache into a local one. Its deadline is that of ctx; the caller sets it from llm.SyncKvCacheWaitTime.
// The checks are those of spec §8.5.2. When it has returned, nothing of it writes into the destination.
func (e *Engine) Pull(ctx context.Context, call *PullCall) error {
	deadline, _ := ctx.Deadline()
	p, err := e.BeginPull(deadline, call)
	if err != nil {
		return err
	}
	return p.Finish(ctx)
}

// Pulling is a pull that has passed its checks. Finish is called exactly once.
type Pulling struct {
	call      *PullCall
	use       *cache.Use
	link      *link.Link
	request   transport.Request
	operation transport.Operation // nil where the transport does all of it in Finish
}

// BeginPull makes the checks of a pull and sends its request, where the transport can do so without waiting.
func (e *Engine) BeginPull(deadline time.Time, call *PullCall) (*Pulling, error) {
	use, err := e.destination(call)
	if err != nil {
		return nil, err
	}
	p := &Pulling{call: call, use: use}
	if err := p.begin(e, deadline); err != nil {
		use.Release()
		return nil, err
	}
	return p, nil
}

func (p *Pulling) begin(e *Engine, deadline time.Time) (err error) {
	if p.link, err = e.linkTo(p.call.Cluster); err != nil {
		return status.From(err, status.StageResolve).At(p.call.Cluster, "")
	}
	if _, err := p.use.Backing(); err != nil {
		return err
	}
	p.request = transport.Request{Key: p.call.Key, Plan: p.call.Plan, Local: p.use.Entry().Shape}
	beginner, ok := p.link.Session().(transport.Beginner)
	if !ok {
		return nil
	}
	p.operation, err = beginner.Begin(deadline, &p.request, p.local())
	return p.explained(err)
}

func (p *Pulling) local() transport.Local { return transport.Local{Addrs: p.use.Entry().Addrs} }

// Done is closed when nothing of the pull writes into the destination any more; nil where only Finish tells.
func (p *Pulling) Done() <-chan struct{} {
	if p.operation == nil {
		return nil
	}
	return p.operation.Done()
}

// Quick says, after Done, that Finish does not wait for the peer.
func (p *Pulling) Quick() bool { return p.operation.Quick() }

// Finish waits for the rest of the pull, which ends when ctx ends, and returns its result.
func (p *Pulling) Finish(ctx context.Context) error {
	defer p.use.Release()
	if p.operation != nil {
		return p.explained(p.operation.Finish(ctx))
	}
	return p.explained(p.link.Session().Pull(ctx, &p.request, p.local()))
}

// explained adds who the peer is; nil stays nil.
func (p *Pulling) explained(err error) error {
	if err == nil {
		return nil
	}
	if status.CodeOf(err) == status.NotYetLink {
		// The session has ended since the look-up. The link is to be dead when this call returns: a link_clusters that comes next
		// must not find it alive.
		p.link.Fail(errors.Unwrap(err))
	}
	return status.From(err, status.StageTransfer).At(p.call.Cluster, p.link.Peer().Address)
}

// CheckPull makes the local checks of a pull and moves nothing.
func (e *Engine) CheckPull(call *PullCall) error {
	use, err := e.destination(call)
	if err != nil {
		return err
	}
	use.Release()
	return nil
}

// destination returns the local cache of a pull, held, when the call fits it.
func (e *Engine) destination(call *PullCall) (*cache.Use, error) {
	if call.Cluster == e.clusterID {
		return nil, status.New(status.ParamInvalid, status.StageCheck, "the own cluster is no source of a pull").At(call.Cluster, "")
	}
	use, err := e.table.Use(call.Cache)
	if err != nil {
		return nil, err
	}
	if err := e.checkDestination(use, call); err != nil {
		use.Release()
		return nil, err
	}
	return use, nil
}

func (e *Engine) checkDestination(use *cache.Use, call *PullCall) error {
	entry := use.Entry()
	ranged := !call.Plan.SrcTensors.All || !call.Plan.DstTensors.All
	if ranged && (call.TensorsPerLayer == 0 || entry.Shape.Tensors%call.TensorsPerLayer != 0) {
		return status.Newf(status.ParamInvalid, status.StageCheck, "the local cache's %d tensors are no multiple of tensor_num_per_layer %d",
			entry.Shape.Tensors, call.TensorsPerLayer)
	}
	call.Plan.OneSided = e.options.OneSided
	if err := plan.CheckLocal(&call.Plan, entry.Shape); err != nil {
		return err
	}
	if e.options.OneSided && !entry.Accessible {
		return status.Newf(status.ParamInvalid, status.StageCheck, "the local cache %d is not remote accessible", entry.ID).
			Hinting("register it with remote_accessible=True")
	}
	return nil
}

// Unregister takes a cache off the table and waits, until ctx ends, for this engine's own operations on its memory. Unknown ids are
// fine. Peers that are pulling from it get CacheNotExist.
func (e *Engine) Unregister(ctx context.Context, id int64) error { return e.table.Unregister(ctx, id) }
