// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"cmp"
	"encoding/json"
	"math"
	"slices"
	"strconv"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// PoolConfig is what a pool's JSON text says.
type PoolConfig struct {
	Bytes     uint64
	PageShift uint // pages of 1 << PageShift bytes
}

// The limits of spec §8.14.
const (
	minPageShift     = 10
	maxPageShift     = 30
	defaultPageShift = 16
	maxPages         = math.MaxUint32 - 1
)

// ParsePoolConfig reads {"memory_size": bytes, "page_shift": 16}. Both are plain unsigned integers, the second may be left out;
// other members are ignored. Everything else is status.ParamInvalid.
func ParsePoolConfig(jsonText string) (PoolConfig, error) {
	// Not a struct: encoding/json would accept the names in any case, and null as a number.
	var members map[string]json.RawMessage
	if err := json.Unmarshal([]byte(jsonText), &members); err != nil {
		return PoolConfig{}, invalid("pool configuration is not a JSON object: %w", err)
	}
	config := PoolConfig{PageShift: defaultPageShift}
	size, found := members["memory_size"]
	if !found {
		return PoolConfig{}, invalid("pool configuration has no memory_size")
	}
	var err error
	if config.Bytes, err = strconv.ParseUint(string(size), 10, 64); err != nil {
		return PoolConfig{}, invalid("memory_size of the pool is not an unsigned integer: %w", err)
	}
	if shift, found := members["page_shift"]; found {
		value, err := strconv.ParseUint(string(shift), 10, 8)
		if err != nil {
			return PoolConfig{}, invalid("page_shift of the pool is not an unsigned integer from %d to %d: %w", minPageShift, maxPageShift, err)
		}
		config.PageShift = uint(value)
	}
	return config, config.check()
}

func (c PoolConfig) check() error {
	switch {
	case c.PageShift < minPageShift || c.PageShift > maxPageShift:
		return invalid("page_shift %d of the pool is not from %d to %d", c.PageShift, minPageShift, maxPageShift)
	case c.pages() == 0:
		return invalid("a pool of %d bytes is smaller than its pages of %d bytes", c.Bytes, uint64(1)<<c.PageShift)
	case c.pages() > maxPages:
		return invalid("a pool of %d bytes has too many pages of %d bytes", c.Bytes, uint64(1)<<c.PageShift)
	}
	return nil
}

func (c PoolConfig) pages() uint64 { return c.Bytes >> c.PageShift }

// pool hands out pages of one reservation. Its state is guarded by Table.mu; memory may be used without.
type pool struct {
	memory    mem.Memory
	shared    *mem.HostMemory // memory, where peers on this host can map it; nil: they can't
	number    uint32          // 1 + its place in Table.SharedPools; 0: it has none
	pageShift uint
	pages     uint64
	used      uint64 // pages that are not in free
	free      extentSet
}

func newPool(reserve func(bytes uint64) (mem.Memory, error), config PoolConfig) (*pool, error) {
	if err := config.check(); err != nil {
		return nil, err
	}
	memory, err := reserve(config.Bytes)
	if err != nil {
		return nil, status.From(err, status.StageCheck)
	}
	p := &pool{memory: memory, pageShift: config.PageShift, pages: config.pages()}
	p.shared, _ = memory.(*mem.HostMemory)
	p.free.give(extent{0, p.pages})
	return p, nil
}

// take obtains one run of pages for each tensor, or nothing at all.
func (p *pool) take(tensors uint32, tensorBytes uint64) ([]uintptr, []extent, error) {
	pages := (tensorBytes-1)>>p.pageShift + 1
	// The quick refusal also keeps an absurd number of tensors from being tried one by one.
	if uint64(tensors) > (p.pages-p.used)/pages {
		return nil, nil, p.exhausted(tensors, tensorBytes)
	}
	addrs, extents := make([]uintptr, tensors), make([]extent, 0, tensors)
	for i := range addrs {
		start, ok := p.free.take(pages)
		if !ok {
			p.give(extents)
			return nil, nil, p.exhausted(tensors, tensorBytes)
		}
		p.used += pages
		addrs[i] = p.memory.Addr() + uintptr(start<<p.pageShift)
		extents = append(extents, extent{start, pages})
	}
	return addrs, joined(extents), nil
}

func (p *pool) exhausted(tensors uint32, tensorBytes uint64) error {
	return status.Newf(status.OutOfMemory, status.StageCheck, "no room for %d tensors of %d bytes: %d of %d bytes of the pool are free",
		tensors, tensorBytes, (p.pages-p.used)<<p.pageShift, p.pages<<p.pageShift).
		Hinting("free caches, or configure a larger pool; a tensor takes whole pages that lie side by side")
}

// offsets are addresses as a peer can use them that has mapped the pool.
func (p *pool) offsets(addrs []uintptr) []uintptr {
	offsets := make([]uintptr, len(addrs))
	for i, addr := range addrs {
		offsets[i] = addr - p.memory.Addr()
	}
	return offsets
}

// give makes pages available again.
func (p *pool) give(extents []extent) {
	for _, run := range extents {
		p.free.give(run)
		p.used -= run.pages
	}
}

// discard gives the memory behind pages back to the system. Called without Table.mu, and before give: until then nobody else can own the
// pages, so that a hole is never punched into a successor's bytes. Memory that can't be given back stays committed, no more.
func (p *pool) discard(extents []extent) {
	for _, run := range extents {
		_ = p.memory.Discard(run.start<<p.pageShift, run.pages<<p.pageShift)
	}
}

// joined sorts runs by address and joins neighbours, in place: fewer holes to punch.
func joined(extents []extent) []extent {
	slices.SortFunc(extents, func(a, b extent) int { return cmp.Compare(a.start, b.start) })
	out := extents[:0]
	for _, run := range extents {
		if n := len(out); n > 0 && out[n-1].end() == run.start {
			out[n-1].pages += run.pages
			continue
		}
		out = append(out, run)
	}
	return slices.Clip(out)
}
