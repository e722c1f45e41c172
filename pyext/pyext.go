// SPDX-License-Identifier: Apache-2.0

// Package pyext is the boundary between Python and the engine: flat functions over integers, strings and packed arrays (address and
// count). gopy sees this package alone, and it has no logic of its own.
//
// Results. Where a comment says nothing else, a function returns 0 or more on success; a negative result is minus the number under
// which [ErrorTake] returns the failure, once, as a JSON object (code, operation, peer, address, stage, cause, hint, text).
//
// Long calls are a Start function and [Wait]. Python draws the operation's number, above 0 and never used twice, and passes it in; both
// return 1 while the operation is running, 0 when it has succeeded, minus its number when it has failed. [Cancel] ends an operation
// by its number.
//
// Packed arrays hold 64-bit little-endian words. They are copied before the function returns, so that Python may drop them; 64-bit
// unsigned values that Python passes as an int64 keep their bits.
package pyext

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/cache"
	"github.com/llm-datadist-open/llm-datadist/core/engine"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
	"github.com/llm-datadist-open/llm-datadist/pyext/backend"
)

// version is the engine's release, the same as the Python package's: both are built into one wheel.
const version = "0.1.0"

// Version returns the release that the engine was built from. It answers only when the Go runtime is up.
func Version() string { return version }

// DescriptorTable returns the address of the table of the engine's descriptors, for a forked child: entries of three words, fd or -1,
// st_dev, st_ino. It never moves.
func DescriptorTable() int64 { addr, _ := mem.DescriptorTable(); return int64(addr) }

// DescriptorEntries returns how many entries the table has.
func DescriptorEntries() int64 { _, entries := mem.DescriptorTable(); return int64(entries) }

// Held counts engines, operations, failures and texts that are kept. It is 0 when everything has ended.
func Held() int64 { return backend.Held() }

// ErrorTake returns the failure that lies under a number and forgets it; "" where there is none.
func ErrorTake(number int64) string { return backend.TakeFailure(number) }

// TextTake returns the text that an operation has left and forgets it; "" where there is none.
func TextTake(number int64) string { return backend.TakeText(number) }

// Wait waits for an operation for at most waitMillis.
func Wait(number, waitMillis int64) int64 { return backend.Wait(number, millis(waitMillis)) }

// Cancel ends an operation, known or not, and waits for at most waitMillis until it has let go: 0 when it has, 1 when not yet.
func Cancel(number, waitMillis int64) int64 { return backend.Cancel(number, millis(waitMillis)) }

// EventsOpen returns a descriptor that is readable while lines for the log wait.
func EventsOpen() int64 { return direct(backend.OpenEvents) }

// EventsClose closes that descriptor and returns 0.
func EventsClose() int64 { backend.CloseEvents(); return 0 }

// EventsWake makes the descriptor readable without a line, and returns 0.
func EventsWake() int64 { backend.WakeEvents(); return 0 }

// EventsTake returns the waiting lines as a JSON array of objects (level, text, engine, cluster, cause); "" for none.
func EventsTake() string { return backend.TakeEvents() }

// EngineOpen makes an engine from its cluster id, its options and its environment, both JSON objects of strings, under a handle that
// Python draws as it draws the numbers of operations: a signal that takes the result away does not take the engine with it. It
// returns 0.
func EngineOpen(handle, clusterID int64, options, environment string) int64 {
	return direct(func() (int64, error) { return 0, backend.Open(handle, uint64(clusterID), options, environment) })
}

// EngineClose starts to finalize an engine. An unknown handle is fine.
func EngineClose(number, handle, waitMillis int64) int64 {
	return backend.Start(number, millis(waitMillis), 0, func(context.Context) (string, error) { return "", backend.Close(handle) })
}

// ListenAddress returns the bound "ip:port", or "".
func ListenAddress(handle int64) string {
	e, err := backend.Engine(handle)
	if err != nil {
		return ""
	}
	return e.ListenAddress()
}

// DeviceApart says, as 1, that the host can't touch DEVICE memory.
func DeviceApart(handle int64) int64 {
	e, err := backend.Engine(handle)
	if err != nil || !e.DeviceApart() {
		return 0
	}
	return 1
}

// Explain tells how the link to a cluster works and why it failed; "" for an id never met.
func Explain(handle, cluster int64) string {
	e, err := backend.Engine(handle)
	if err != nil {
		return ""
	}
	return e.Explain(uint64(cluster))
}

// SwitchRole makes the engine listen on "ip:port", or stop listening for "".
func SwitchRole(handle int64, address string) int64 {
	return with(handle, func(e *engine.Engine) (int64, error) { return 0, e.SwitchRole(address) })
}

// Links returns the live links as a JSON array of objects (cluster, address); "" for an unknown handle.
func Links(handle int64) string {
	e, err := backend.Engine(handle)
	if err != nil {
		return ""
	}
	text, err := json.Marshal(e.Links())
	if err != nil {
		return ""
	}
	return string(text)
}

// LinkCheckStart waits until nothing is under way on a link, then for an answer of its peer; for llm.SyncKvCacheWaitTime together.
func LinkCheckStart(number, handle, waitMillis, cluster int64) int64 {
	return start(number, handle, waitMillis, backend.Timeout(handle), func(ctx context.Context, e *engine.Engine) (string, error) {
		return "", e.CheckLink(ctx, uint64(cluster))
	})
}

// LinkStart links to clusters, a JSON array of (id or null, local ips, remote "ip:port"s). The operation leaves a JSON array of codes.
func LinkStart(number, handle, waitMillis, timeoutMillis int64, clusters string) int64 {
	return linking(number, handle, waitMillis, timeoutMillis, clusters, (*engine.Engine).LinkClusters)
}

// UnlinkStart unlinks clusters, in the same form.
func UnlinkStart(number, handle, waitMillis, timeoutMillis int64, clusters string, force bool) int64 {
	return linking(number, handle, waitMillis, timeoutMillis, clusters, func(e *engine.Engine, ctx context.Context, list []engine.Cluster) []error {
		return e.UnlinkClusters(ctx, list, force)
	})
}

func linking(number, handle, waitMillis, timeoutMillis int64, clusters string, call func(*engine.Engine, context.Context, []engine.Cluster) []error) int64 {
	return start(number, handle, waitMillis, millis(timeoutMillis), func(ctx context.Context, e *engine.Engine) (string, error) {
		var list []engine.Cluster
		if err := json.Unmarshal([]byte(clusters), &list); err != nil {
			return "", status.Newf(status.ParamInvalid, status.StageCheck, "the clusters are malformed: %w", err)
		}
		codes := make([]uint32, 0, len(list))
		for _, err := range call(e, ctx, list) {
			codes = append(codes, uint32(status.CodeOf(err)))
		}
		text, err := json.Marshal(codes)
		return string(text), err
	})
}

// GroupLink starts to link the members of a group to each other and returns the communicator's id. request is a JSON object: name,
// members as a list of (cluster id as a decimal string, rank), table as the text of the rank table.
func GroupLink(handle int64, request string) int64 {
	return with(handle, func(e *engine.Engine) (int64, error) {
		var r struct {
			Name    string
			Members []engine.GroupMember
			Table   string
		}
		if err := json.Unmarshal([]byte(request), &r); err != nil {
			return 0, status.Newf(status.ParamInvalid, status.StageCheck, "the group is malformed: %w", err)
		}
		comm, err := e.GroupLink(r.Name, r.Members, r.Table)
		return int64(comm), err
	})
}

// GroupUnlinkStart starts to unlink a communicator.
func GroupUnlinkStart(number, handle, waitMillis, comm int64) int64 {
	return start(number, handle, waitMillis, 0, func(ctx context.Context, e *engine.Engine) (string, error) {
		return "", e.GroupUnlink(ctx, uint64(comm))
	})
}

// GroupStatus returns the state of a communicator: 0 linked, 1 preparing, 2 failed.
func GroupStatus(handle, comm int64) int64 {
	return with(handle, func(e *engine.Engine) (int64, error) {
		state, err := e.GroupStatus(uint64(comm))
		return int64(state), err
	})
}

// MemoryRemap is remap_registered_memory.
func MemoryRemap(handle int64) int64 {
	return with(handle, func(e *engine.Engine) (int64, error) { return 0, e.Remap() })
}

// CacheRegister enters memory into the engine's table and returns the cache's id. desc is packed as for desc(); addrs has the address of
// each tensor; keys has three words each: id, model id, 1 for a prefix key.
func CacheRegister(handle, descAddr, descCount, addrsAddr, addrsCount, keysAddr, keysCount int64, accessible bool) int64 {
	return with(handle, func(e *engine.Engine) (int64, error) {
		addrs := make([]uintptr, 0, addrsCount)
		for _, addr := range words(addrsAddr, addrsCount) {
			addrs = append(addrs, uintptr(addr))
		}
		return e.Register(desc(descAddr, descCount), addrs, keys(keysAddr, keysCount), accessible)
	})
}

// CacheAllocate takes memory from a pool, writes the address of each tensor to the array at outAddr, which has room for outCount
// words, and returns the cache's id.
func CacheAllocate(handle, descAddr, descCount, keysAddr, keysCount, outAddr, outCount int64) int64 {
	return with(handle, func(e *engine.Engine) (int64, error) {
		id, addrs, err := e.Allocate(desc(descAddr, descCount), keys(keysAddr, keysCount))
		if err != nil {
			return 0, err
		}
		out := mem.View(uintptr(outAddr), uint64(outCount)*8)
		for i, addr := range addrs[:min(len(addrs), int(outCount))] {
			binary.LittleEndian.PutUint64(out[i*8:], uint64(addr))
		}
		return id, nil
	})
}

// CacheUnregister starts to take a cache off the table; it waits for this engine's own operations on it.
func CacheUnregister(number, handle, waitMillis, id int64) int64 {
	return start(number, handle, waitMillis, backend.Timeout(handle), func(ctx context.Context, e *engine.Engine) (string, error) {
		return "", e.Unregister(ctx, id)
	})
}

// CacheDeallocate gives up the owner's hold on an allocated cache.
func CacheDeallocate(handle, id int64, blocks bool) int64 {
	return with(handle, func(e *engine.Engine) (int64, error) { return 0, e.Deallocate(id, blocks) })
}

// KeyRemove unbinds a key.
func KeyRemove(handle, id, model int64, prefix bool) int64 {
	return with(handle, func(e *engine.Engine) (int64, error) {
		return 0, e.RemoveKey(cache.Key{ID: uint64(id), Model: uint64(model), Prefix: prefix})
	})
}

// The words of PullStart's parameters.
const (
	pullCluster = iota
	pullKeyKind // 1 normal, 2 prefix, 3 cache id and batch
	pullKeyID
	pullKeyModel
	pullKeyCache
	pullKeyBatch
	pullCache // id of the local cache
	pullBatch
	pullSize
	pullSrcFirst // first tensor, or -1 for all
	pullSrcCount
	pullDstFirst
	pullDstCount
	pullPerLayer
	pullSrcOffset
	pullDstOffset
	pullFlags
	pullParts // of the caches' tensors that the ranges are of: 1, or the devices of v1 mode
	pullWords
)

// pullExact, of pullFlags: the offsets were given.
const pullExact = 1

// PullStart starts pull_cache or pull_blocks. params has the words above; src and dst are block ids.
func PullStart(number, handle, waitMillis, paramsAddr, srcAddr, srcCount, dstAddr, dstCount int64) int64 {
	return backend.StartPull(number, handle, millis(waitMillis), pullCall(paramsAddr, srcAddr, srcCount, dstAddr, dstCount))
}

// PullNothing is PullStart without the transfer: what is left is the price of the boundary, for benchmarks.
func PullNothing(number, handle, waitMillis, paramsAddr, srcAddr, srcCount, dstAddr, dstCount int64) int64 {
	call := pullCall(paramsAddr, srcAddr, srcCount, dstAddr, dstCount)
	defer backend.EndPull(call)
	return with(handle, func(e *engine.Engine) (int64, error) { return 0, e.CheckPull(call) })
}

func pullCall(paramsAddr, srcAddr, srcCount, dstAddr, dstCount int64) *engine.PullCall {
	var packed [pullWords]uint64
	p := appendWords(packed[:0], paramsAddr, pullWords)
	call := backend.NewPull()
	src, dst := call.Plan.SrcBlocks[:0], call.Plan.DstBlocks[:0]
	*call = engine.PullCall{
		Cluster: p[pullCluster],
		Key: transport.Key{Kind: transport.KeyKind(p[pullKeyKind]), ID: p[pullKeyID], Model: p[pullKeyModel], CacheID: int64(p[pullKeyCache]),
			Batch: p[pullKeyBatch]},
		Cache: int64(p[pullCache]),
		Plan: plan.Request{
			SrcTensors: tensors(p[pullSrcFirst], p[pullSrcCount], p[pullParts]), DstTensors: tensors(p[pullDstFirst], p[pullDstCount], p[pullParts]),
			SrcOffset: p[pullSrcOffset], DstOffset: p[pullDstOffset], Exact: p[pullFlags]&pullExact != 0,
			DstBatch: p[pullBatch], Size: int64(p[pullSize]), SrcBlocks: appendWords(src, srcAddr, srcCount), DstBlocks: appendWords(dst, dstAddr, dstCount),
		},
		TensorsPerLayer: uint32(p[pullPerLayer]),
	}
	return call
}

// The words of PushStart's parameters.
const (
	pushCluster = iota
	pushKeyKind // 1 normal, 2 prefix, 3 cache id and batch, 0 raw addresses
	pushKeyID
	pushKeyModel
	pushKeyCache
	pushDstBatch
	pushCache // id of the local cache
	pushSrcBatch
	pushSrcFirst // first tensor, or -1 for all
	pushSrcCount
	pushDstFirst
	pushDstCount
	pushPerLayer
	pushBlockBytes // of a destination block; 0: not said
	pushWords
)

// PushStart starts push_cache, push_blocks or a layer of transfer_cache_async. params has the words above; src and dst are block ids;
// addrs are the addresses of the destination's tensors where the key kind is 0. The deadline is llm.SyncKvCacheWaitTime.
func PushStart(number, handle, waitMillis, paramsAddr, srcAddr, srcCount, dstAddr, dstCount, addrsAddr, addrsCount int64) int64 {
	p := words(paramsAddr, pushWords)
	call := &engine.PushCall{
		Cluster: p[pushCluster],
		Key: transport.Key{Kind: transport.KeyKind(p[pushKeyKind]), ID: p[pushKeyID], Model: p[pushKeyModel], CacheID: int64(p[pushKeyCache]),
			Batch: p[pushDstBatch]},
		Addrs: words(addrsAddr, addrsCount),
		Cache: int64(p[pushCache]),
		Plan: plan.Request{
			SrcTensors: tensors(p[pushSrcFirst], p[pushSrcCount], 1), DstTensors: tensors(p[pushDstFirst], p[pushDstCount], 1),
			SrcBatch: p[pushSrcBatch], DstBatch: p[pushDstBatch], SrcBlocks: words(srcAddr, srcCount), DstBlocks: words(dstAddr, dstCount),
		},
		BlockBytes: p[pushBlockBytes], TensorsPerLayer: uint32(p[pushPerLayer]),
	}
	return start(number, handle, waitMillis, backend.Timeout(handle), func(ctx context.Context, e *engine.Engine) (string, error) {
		return "", e.Push(ctx, call)
	})
}

// CopyCacheStart starts copy_cache.
func CopyCacheStart(number, handle, waitMillis, dst, src, dstBatch, srcBatch, offset, size int64) int64 {
	call := engine.CopyCall{Dst: dst, Src: src, DstBatch: uint64(dstBatch), SrcBatch: uint64(srcBatch), Offset: uint64(offset), Size: size}
	return start(number, handle, waitMillis, 0, func(_ context.Context, e *engine.Engine) (string, error) { return "", e.CopyCache(call) })
}

// CopyBlocksStart starts copy_blocks: pairs of source and destination blocks, two words each.
func CopyBlocksStart(number, handle, waitMillis, id, pairsAddr, pairsCount int64) int64 {
	pairs := words(pairsAddr, pairsCount)
	return start(number, handle, waitMillis, 0, func(_ context.Context, e *engine.Engine) (string, error) { return "", e.CopyBlocks(id, pairs) })
}

// SwapBlocksStart starts swap_blocks between the tensors at two lists of addresses, of memory of two placements (0 host, 1 device).
func SwapBlocksStart(
	number, handle, waitMillis, dstAddr, srcAddr, dstPlacement, srcPlacement, tensorCount, blockBytes, pairsAddr, pairsCount int64,
) int64 {
	dst, src, pairs := addresses(dstAddr, tensorCount), addresses(srcAddr, tensorCount), words(pairsAddr, pairsCount)
	return start(number, handle, waitMillis, 0, func(_ context.Context, e *engine.Engine) (string, error) {
		return "", e.SwapBlocks(dst, src, cache.Placement(dstPlacement), cache.Placement(srcPlacement), uint64(blockBytes), pairs)
	})
}

// desc unpacks a description: kind (1 contiguous, 2 blocks), tensors, element bytes, placement (0 host, 1 device), which dimension is
// the sequence (-1: not said), then the dims.
func desc(addr, count int64) cache.Desc {
	const fixed = 5
	w := words(addr, count)
	d := cache.Desc{Kind: plan.Kind(w[0]), Tensors: uint32(w[1]), ElementBytes: w[2], Placement: cache.Placement(w[3]), SeqLenDim: int32(w[4])}
	for _, dim := range w[fixed:] {
		d.Dims = append(d.Dims, int64(dim))
	}
	return d
}

func keys(addr, count int64) []cache.Key {
	const wordsPerKey = 3
	w := words(addr, count*wordsPerKey)
	out := make([]cache.Key, 0, count)
	for ; len(w) > 0; w = w[wordsPerKey:] {
		out = append(out, cache.Key{ID: w[0], Model: w[1], Prefix: w[2] == 1})
	}
	return out
}

func tensors(first, count, parts uint64) plan.Range {
	if int64(first) < 0 {
		return plan.Range{All: true}
	}
	return plan.Range{First: uint32(first), Count: uint32(count), Parts: uint32(parts)}
}

func addresses(addr, count int64) []uintptr {
	out := make([]uintptr, 0, count)
	for _, word := range words(addr, count) {
		out = append(out, uintptr(word))
	}
	return out
}

// words copies a packed array.
func words(addr, count int64) []uint64 {
	if count <= 0 {
		return nil
	}
	return appendWords(make([]uint64, 0, count), addr, count)
}

// appendWords copies a packed array behind out.
func appendWords(out []uint64, addr, count int64) []uint64 {
	if count <= 0 {
		return out
	}
	for view := mem.View(uintptr(addr), uint64(count)*8); len(view) > 0; view = view[8:] {
		out = append(out, binary.LittleEndian.Uint64(view))
	}
	return out
}

func millis(n int64) time.Duration { return time.Duration(n) * time.Millisecond }

// with makes a short call on an engine.
func with(handle int64, call func(*engine.Engine) (int64, error)) int64 {
	return direct(func() (int64, error) {
		e, err := backend.Engine(handle)
		if err != nil {
			return 0, err
		}
		return call(e)
	})
}

// start starts a long call on an engine.
func start(number, handle, waitMillis int64, timeout time.Duration, run func(context.Context, *engine.Engine) (string, error)) int64 {
	return backend.Start(number, millis(waitMillis), timeout, func(ctx context.Context) (string, error) {
		e, err := backend.Engine(handle)
		if err != nil {
			return "", err
		}
		return run(ctx, e)
	})
}

// direct turns a result and an error into one number. A panic becomes a failure: none crosses the boundary.
func direct(call func() (int64, error)) (result int64) {
	defer func() {
		if r := recover(); r != nil {
			result = backend.Fail(0, backend.Panicked(r))
		}
	}()
	value, err := call()
	if err != nil {
		return backend.Fail(0, err)
	}
	return value
}
