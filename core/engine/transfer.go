// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"

	"github.com/llm-datadist-open/llm-datadist/core/cache"
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
// The checks are those of spec §8.5.2, in that order. When it has returned, nothing of it writes into the destination.
func (e *Engine) Pull(ctx context.Context, call *PullCall) error {
	use, err := e.destination(call)
	if err != nil {
		return err
	}
	defer use.Release()
	l, err := e.linkTo(call.Cluster)
	if err != nil {
		return status.From(err, status.StageResolve).At(call.Cluster, "")
	}
	if _, err := use.Backing(); err != nil {
		return err
	}
	entry := use.Entry()
	request := transport.Request{Key: call.Key, Plan: call.Plan, Local: entry.Shape}
	if err := l.Session().Pull(ctx, &request, transport.Local{Addrs: entry.Addrs}); err != nil {
		if status.CodeOf(err) == status.NotYetLink {
			// The session has ended since the look-up. The link is to be dead when this call returns: a link_clusters that comes next
			// must not find it alive.
			l.Fail(errors.Unwrap(err))
			err = l.Cause()
		}
		return status.From(err, status.StageTransfer).At(call.Cluster, l.Peer().Address)
	}
	return nil
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
