// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"

	"github.com/llm-datadist-open/llm-datadist/core/cache"
	"github.com/llm-datadist-open/llm-datadist/core/link"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// What v1 mode (spec §9) needs of the engine beside what both modes share. Its policy is Python's.

// isOwn says that a transfer names the own cluster. In v1 mode that is no error: both ends of a link may have the same cluster id.
func (e *Engine) isOwn(cluster uint64) bool { return e.options.CacheManager && cluster == e.clusterID }

// movesWhole says whether a pull gets the whole batch row whatever it asks for, as one by key does in v1 mode unless the cache is
// described as having its sequence behind the batch.
func (e *Engine) movesWhole(req *transport.Request, source *cache.Entry) bool {
	const behindBatch = 1
	byKey := req.Key.Kind == transport.KeyNormal || req.Key.Kind == transport.KeyPrefix
	return !e.options.CacheManager && byKey && !req.Plan.Exact && source.Shape.Kind == plan.Contiguous && source.SeqLenDim != behindBatch
}

// allocateFailure gives the failures of an allocation the codes that v1 mode has for them.
func (e *Engine) allocateFailure(err error) error {
	if !e.options.CacheManager && errors.Is(err, cache.ErrKeyInUse) {
		return recoded(err, status.Failed)
	}
	return err
}

// deallocateOlder frees a cache of either kind. An unknown id is CacheNotExist.
func (e *Engine) deallocateOlder(id int64) error {
	var use cache.Use
	if err := e.table.Hold(id, &use); err != nil {
		return err
	}
	blocks := use.Entry().Shape.Kind == plan.Blocks
	use.Release()
	return e.table.Deallocate(id, blocks)
}

// unlinkFailure tells the caller in v1 mode of a link that was still in use when its time was over.
func (e *Engine) unlinkFailure(err error) error {
	if !e.options.CacheManager && errors.Is(err, link.ErrBusy) {
		return recoded(err, status.LinkBusy)
	}
	return err
}

// waitsForLinks says that calls wait while their link is being unlinked, as in v1 mode (spec §9.5, §14 row 12).
func (e *Engine) waitsForLinks() bool { return !e.options.CacheManager }

// linkWithin is linkTo, but waits where the mode has it so: LinkBusy where the link is still being unlinked when ctx ends.
func (e *Engine) linkWithin(ctx context.Context, id uint64) (*link.Link, error) {
	if !e.waitsForLinks() {
		return e.linkTo(id)
	}
	return e.linkBy(func(id uint64) (*link.Link, error) { return e.links.Settled(ctx, id) }, id)
}

func recoded(err error, code status.Code) *status.Error {
	out := *status.From(err, status.StageCheck)
	out.Code = code
	return &out
}

// LinkInfo describes a live link.
type LinkInfo struct {
	Cluster uint64 `json:"cluster"`
	Address string `json:"address"` // "ip:port" that was dialed, or that the connection came from; "" over the loopback fabric
}

// Links lists the live links.
func (e *Engine) Links() []LinkInfo {
	links := []LinkInfo{}
	for _, peer := range e.links.LivePeers() {
		info := LinkInfo{Cluster: peer.ClusterID, Address: peer.Address}
		if info.Address == nameLoopback {
			info.Address = ""
		}
		links = append(links, info)
	}
	return links
}

// CheckLink waits until nothing is under way on the link to a cluster, then asks the peer for an answer. It ends when ctx ends: LinkBusy
// where the link is in use or being unlinked until then, Timeout where the peer does not answer. Without a live link it is NotYetLink.
func (e *Engine) CheckLink(ctx context.Context, cluster uint64) error {
	l, err := e.linkWithin(ctx, cluster)
	if err != nil {
		return unlinked(cluster, err)
	}
	select {
	case <-l.Session().Idle():
	case <-ctx.Done():
		return status.New(status.LinkBusy, status.StageCheck, "operations on the link did not end in time").At(cluster, l.Peer().Address)
	}
	spare, err := mem.NewBuffer(1) // for an owner that sends something all the same
	if err != nil {
		return err
	}
	defer func() { _ = spare.Free() }()
	err = l.Session().Pull(ctx, unanswerable(), transport.Local{Addrs: []uintptr{spare.Addr()}, Backing: mem.BackingAnonymous})
	if err == nil || status.CodeOf(err) == status.CacheNotExist {
		return nil
	}
	return explained(l, cluster, err)
}

// unanswerable asks for what no owner can have, a prefix key without an id, so that the answer moves nothing.
func unanswerable() *transport.Request {
	return &transport.Request{
		Key:   transport.Key{Kind: transport.KeyPrefix, ID: cache.NoID},
		Plan:  plan.Request{SrcTensors: plan.Range{All: true}, DstTensors: plan.Range{All: true}, Size: 1, Exact: true},
		Local: plan.Shape{Kind: plan.Contiguous, Tensors: 1, TensorBytes: 1, Stride: 1, Count: 1},
	}
}
