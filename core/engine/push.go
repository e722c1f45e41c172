// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"math"
	"math/bits"
	"slices"

	"github.com/llm-datadist-open/llm-datadist/core/cache"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// PushCall is one push_cache or push_blocks, or one layer of a transfer_cache_async.
type PushCall struct {
	Cluster uint64        // the peer to push to
	Key     transport.Key // the destination; not looked at where Addrs is set
	Addrs   []uint64      // or the raw addresses of the destination's tensors, in the peer's process
	Cache   int64         // id of the local source
	// Plan says which bytes: Src is ours. Whole rows are pushed, so Size is not looked at.
	Plan plan.Request
	// BlockBytes are those of a destination block; 0: not said.
	BlockBytes uint64
	// TensorsPerLayer is what Plan's tensor ranges were made with.
	TensorsPerLayer uint32
}

// Push copies a local cache into a peer's, which pulls it. Its deadline is that of ctx; the caller sets it from llm.SyncKvCacheWaitTime.
// The checks are those of spec §8.9, those of this side first. When it has returned, the peer has confirmed that nothing of it is in
// flight, save in two cases: Timeout with the cause "receiver has not confirmed", and Failed because the link has died or was unlinked by
// force, where the peer may copy for a moment yet, until it has seen that too.
func (e *Engine) Push(ctx context.Context, call *PushCall) error {
	if ctx.Err() != nil {
		return status.From(transport.Ended(ctx), status.StageTransfer).At(call.Cluster, "")
	}
	var use cache.Use
	if err := e.table.Hold(call.Cache, &use); err != nil {
		return err
	}
	defer use.Release()
	if e.isOwn(call.Cluster) {
		return status.New(status.ParamInvalid, status.StageCheck, "the own cluster is no destination of a push").At(call.Cluster, "")
	}
	l, err := e.linkWithin(ctx, call.Cluster)
	if err != nil {
		return unlinked(call.Cluster, err)
	}
	if err := e.checkPush(call, use.Entry()); err != nil {
		return err
	}
	source := use.Entry()
	call.Plan.OneSided = e.options.OneSided
	ctx, done := cache.Uses{&use}.Within(ctx)
	defer done()
	return explained(l, call.Cluster, l.Session().Push(ctx, &transport.Push{
		Key: call.Key, Addrs: call.Addrs, Source: source.ID, Generation: source.Generation, Shape: source.Shape, Plan: call.Plan,
		BlockBytes: call.BlockBytes,
	}))
}

// checkPush says whether the local side of a push can be served.
func (e *Engine) checkPush(call *PushCall, source *cache.Entry) error {
	if e.options.OneSided && !source.Accessible {
		return notAccessible(source)
	}
	if call.TensorsPerLayer == 0 || source.Shape.Tensors%call.TensorsPerLayer != 0 {
		return unevenLayers(source, uint64(call.TensorsPerLayer))
	}
	if err := plan.CheckSource(&call.Plan, source.Shape, call.BlockBytes); err != nil {
		return err
	}
	tensors := call.Plan.SrcTensors.Tensors(source.Shape)
	if raw := call.Addrs != nil || call.Key.Kind == 0; raw && uint64(len(call.Addrs)) != tensors {
		return addressCount(len(call.Addrs), tensors)
	}
	return nil
}

func addressCount(addrs int, tensors uint64) error {
	return status.Newf(status.ParamInvalid, status.StageCheck, "%d destination addresses for %d source tensors", addrs, tensors)
}

// Receive implements transport.Receiver: it pulls what the peer of this link pushes. The destination is held until nothing of the pull
// is in flight, which unregistering it brings about.
func (o *owner) Receive(ctx context.Context, push *transport.Push) error {
	select {
	case <-o.attached:
	case <-ctx.Done():
		return transport.Ended(ctx)
	}
	if push.Key.Kind == transport.KeyRelink {
		return o.relink(ctx)
	}
	if push.Plan.SrcTensors.All { // for the destination to be compared with
		push.Plan.SrcTensors = plan.Range{Count: push.Shape.Tensors}
	}
	to, err := o.target(ctx, push)
	if err != nil {
		return err
	}
	defer to.Release()
	backing, err := to.Backing()
	if err != nil {
		return err
	}
	req := transport.Request{
		Key:   transport.Key{Kind: transport.KeyPushed, ID: push.Generation, CacheID: push.Source, Batch: push.Plan.SrcBatch},
		Plan:  push.Plan,
		Local: to.shape,
	}
	// The pusher has checked its side by its own kind; a pull of block 0 as a row is what one-sided mode allows.
	req.Plan.OneSided = true
	req.Plan.Size = int64(push.Shape.Stride)
	if push.Addrs != nil {
		req.Plan.DstTensors, req.Plan.DstBatch = plan.Range{All: true}, 0 // the addresses say which
	}
	if err := plan.CheckLocal(&req.Plan, to.shape); err != nil {
		return err
	}
	ctx, done := to.Within(ctx)
	defer done()
	local := transport.Local{Addrs: to.addrs, Backing: backing}
	if push.Addrs == nil {
		local.Memory = to.Uses[0]
	}
	return o.session.Pull(ctx, &req, local)
}

// target is the destination of a peer's push, held.
type target struct {
	cache.Uses
	shape plan.Shape
	addrs []uintptr
}

// target resolves and holds what a push is to go to.
func (o *owner) target(ctx context.Context, push *transport.Push) (target, error) {
	if push.Shape.Stride == 0 || push.Shape.Stride > math.MaxInt64 {
		return target{}, status.Newf(status.ParamInvalid, status.StageCheck, "a source with rows of %d bytes", push.Shape.Stride)
	}
	if push.Addrs != nil {
		return o.rawTarget(ctx, push)
	}
	lookup, err := lookupOf(push.Key)
	if err != nil {
		return target{}, err
	}
	lookup.OneSided = o.options.OneSided
	if push.Key.Kind == transport.KeyCache {
		lookup.Key = cache.Key{} // what an id of 0 means as a push target in one-sided mode (spec §8.6)
	}
	use := new(cache.Use)
	if err := o.table.HoldTarget(lookup, use); err != nil {
		return target{}, err
	}
	entry := use.Entry()
	to := target{Uses: cache.Uses{use}, shape: entry.Shape, addrs: entry.Addrs}
	if len(push.Plan.DstBlocks) == 0 {
		to.shape = firstRow(entry.Shape)
	} else if err = checkBlockBytes(push, entry.Shape); err != nil {
		use.Release()
		return target{}, err
	}
	return to, nil
}

// firstRow shows a cache of blocks as what it is to a push without blocks: one row of one block.
func firstRow(shape plan.Shape) plan.Shape {
	if shape.Kind != plan.Blocks {
		return shape
	}
	return plan.Shape{Kind: plan.Contiguous, Tensors: shape.Tensors, TensorBytes: shape.Stride, Stride: shape.Stride, Count: 1}
}

// checkBlockBytes says whether source and caller mean blocks of the destination's size.
func checkBlockBytes(push *transport.Push, dst plan.Shape) error {
	said := push.BlockBytes
	if said == 0 && len(push.Plan.SrcBlocks) > 0 {
		said = push.Shape.Stride
	}
	if said != dst.Stride {
		return status.Newf(status.ParamInvalid, status.StageCheck, "blocks of %d bytes are pushed into blocks of %d bytes", said, dst.Stride)
	}
	return nil
}

// rawTarget takes each address as one tensor that reaches as far as the push writes.
func (o *owner) rawTarget(ctx context.Context, push *transport.Push) (target, error) {
	if tensors := push.Plan.SrcTensors.Tensors(push.Shape); uint64(len(push.Addrs)) != tensors {
		return target{}, addressCount(len(push.Addrs), tensors)
	}
	shape := plan.Shape{
		Kind: plan.Contiguous, Tensors: uint32(len(push.Addrs)), TensorBytes: push.Shape.Stride, Stride: push.Shape.Stride, Count: 1,
	}
	if len(push.Plan.DstBlocks) > 0 {
		shape.Kind, shape.Stride = plan.Blocks, push.BlockBytes
		if shape.Stride == 0 {
			shape.Stride = push.Shape.Stride // blocks to blocks; a row that is cut has its size from the caller
		}
		last := slices.Max(push.Plan.DstBlocks)
		over, bytes := bits.Mul64(last, shape.Stride)
		if over != 0 || bytes > math.MaxInt64-shape.Stride {
			return target{}, status.Newf(status.ParamInvalid, status.StageCheck, "block %d of %d bytes is beyond all memory", last, shape.Stride)
		}
		shape.Count, shape.TensorBytes = last+1, bytes+shape.Stride
	}
	to := target{shape: shape, addrs: make([]uintptr, 0, len(push.Addrs))}
	spans := make([]mem.Span, 0, len(push.Addrs))
	for _, addr := range push.Addrs {
		to.addrs = append(to.addrs, uintptr(addr))
		spans = append(spans, mem.Span{Addr: uintptr(addr), Bytes: shape.TensorBytes})
	}
	var err error
	to.Uses, err = o.table.HoldSpans(ctx, spans, o.options.OneSided)
	return to, err
}
