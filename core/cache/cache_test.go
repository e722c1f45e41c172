// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"math"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

const testPool = 1 << 20

// newTable makes a table with two pools of 16 pages of 64 KiB. When the test ends everything must have been let go: closing the
// table must leave nothing.
func newTable(t testing.TB) *Table {
	config := &PoolConfig{Bytes: testPool, PageShift: 16}
	table, err := NewTable(mem.Host(), config, config)
	require.NoError(t, err)
	t.Cleanup(func() { requireNothingLeft(t, table) })
	return table
}

func requireNothingLeft(t testing.TB, table *Table) {
	require.NoError(t, table.Close())
	requireFree(t, table)
	for _, p := range table.pools {
		if p != nil {
			require.Error(t, p.memory.Discard(0, 1), "the pool is closed")
		}
	}
}

// requireFree checks that a table holds nothing and its pools are whole.
func requireFree(t testing.TB, table *Table) {
	require.Equal(t, Stats{Drawn: table.Stats().Drawn}, table.Stats())
	for _, p := range table.pools {
		if p != nil {
			require.Equal(t, p.pages, p.free.root.most(), "one run of free pages")
		}
	}
}

// rows describes a contiguous device cache of 1-byte elements.
func rows(tensors uint32, dims ...int64) Desc {
	return Desc{Kind: plan.Contiguous, Tensors: tensors, Dims: dims, ElementBytes: 1, Placement: Device}
}

func blocks(tensors uint32, dims ...int64) Desc {
	desc := rows(tensors, dims...)
	desc.Kind = plan.Blocks
	return desc
}

func key(id uint64) Key                  { return Key{ID: id} }
func prefix(id uint64) Key               { return Key{ID: id, Prefix: true} }
func byKey(k Key) Lookup                 { return Lookup{Key: k} }
func byID(id int64, batch uint64) Lookup { return Lookup{ByID: true, CacheID: id, Batch: batch} }

func TestShapes(t *testing.T) {
	table := newTable(t)
	e, err := table.Allocate(Desc{Kind: plan.Contiguous, Tensors: 3, Dims: []int64{4, 5, 6}, ElementBytes: 2, Placement: Host}, nil)
	require.NoError(t, err)
	require.Equal(t, plan.Shape{Kind: plan.Contiguous, Tensors: 3, TensorBytes: 240, Stride: 60, Count: 4}, e.Shape)
	require.Equal(t, Host, e.Placement)
	require.True(t, e.Owned && e.Accessible)
	require.Len(t, e.Addrs, 3)
	base := table.pools[Host].memory.Addr()
	require.Equal(t, []uintptr{base, base + 1<<16, base + 2<<16}, e.Addrs)

	e, err = table.Register(blocks(1, 8, 4), []uintptr{1}, nil, false)
	require.NoError(t, err)
	require.Equal(t, plan.Shape{Kind: plan.Blocks, Tensors: 1, TensorBytes: 32, Stride: 4, Count: 8}, e.Shape)
	require.False(t, e.Owned || e.Accessible)
	require.Equal(t, "HOST DEVICE", Host.String()+" "+Device.String())
}

func TestDescriptionsThatAreRefused(t *testing.T) {
	rank := func(n int) Desc {
		dims := make([]int64, n)
		for i := range dims {
			dims[i] = 1
		}
		return rows(1, dims...)
	}
	noElement, badKind, badPlacement := rows(1, 2, 4), rows(1, 2, 4), rows(1, 2, 4)
	noElement.ElementBytes, badKind.Kind, badPlacement.Placement = 0, 9, 2
	cases := []struct {
		name string
		desc Desc
		ok   bool
		id   bool // an id is used up
	}{
		{"rank 1", rank(1), true, true},
		{"rank 31", rank(31), true, true},
		{"rank 0", rank(0), false, false},
		{"rank 32", rank(32), false, false},
		{"no tensors", rows(0, 2, 4), false, false},
		{"unknown kind", badKind, false, false},
		{"unknown placement", badPlacement, false, false},
		{"dimension 0", rows(1, 2, 0), false, true},
		{"negative dimension", rows(1, -2, -4), false, true},
		{"no element size", noElement, false, true},
		{"overflow", rows(1, math.MaxInt64, 4), false, true},
		{"overflow to a small number", rows(1, 1<<32, 1<<32, 2), false, true},
		{"all tensors overflow", rows(4, math.MaxInt64/2), false, true},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			table := newTable(t)
			addrs := make([]uintptr, c.desc.Tensors)
			for call, make := range map[string]func() error{
				"register": func() error { _, err := table.Register(c.desc, addrs, nil, false); return err },
				"allocate": func() error { _, err := table.Allocate(c.desc, nil); return err },
			} {
				before := table.Stats().Drawn
				err := make()
				if c.ok {
					require.NoError(t, err, call)
				} else {
					require.ErrorIs(t, err, status.ParamInvalid, call)
				}
				require.Equal(t, c.id, table.Stats().Drawn > before, call)
			}
		})
	}
}

func TestIdsCountUpAndGenerationsAreNeverReused(t *testing.T) {
	table := newTable(t)
	ids := func(e *Entry, err error) int64 {
		require.NoError(t, err)
		return e.ID
	}
	first, err := table.Allocate(rows(1, 1, 4), nil)
	require.NoError(t, err)
	require.EqualValues(t, 1, first.ID)
	require.EqualValues(t, 1, first.Generation)
	require.EqualValues(t, 2, ids(table.Register(rows(1, 1, 4), []uintptr{1}, nil, true)))

	_, err = table.Register(rows(2, 1, 4), []uintptr{1}, nil, true) // address count: no id
	require.ErrorIs(t, err, status.ParamInvalid)
	_, err = table.Register(rows(1, 1, 4), []uintptr{0}, nil, true) // memory registration: id 3
	require.ErrorIs(t, err, status.ParamInvalid)
	_, err = table.Allocate(rows(1, 1, testPool+1), nil) // pool exhausted: id 4
	require.ErrorIs(t, err, status.OutOfMemory)
	_, err = table.Allocate(rows(1, 1, 4), []Key{key(1), key(2)}) // keys: id 5
	require.ErrorIs(t, err, status.ParamInvalid)
	require.EqualValues(t, 6, ids(table.Register(blocks(1, 1, 4), []uintptr{0}, nil, false)), "address 0 is fine where no peer comes")

	require.NoError(t, table.Deallocate(1, false))
	again, err := table.Allocate(rows(1, 1, 4), nil)
	require.NoError(t, err)
	require.EqualValues(t, 7, again.ID)
	require.Equal(t, first.Addrs, again.Addrs, "the same memory")
	require.Greater(t, again.Generation, first.Generation)
	require.False(t, table.Live(first.Generation))
	require.True(t, table.Live(again.Generation))
	require.False(t, table.Live(0))
}

func TestNoPool(t *testing.T) {
	table, err := NewTable(nil, nil, nil)
	require.NoError(t, err)
	_, err = table.Allocate(rows(1, 1, 4), nil)
	require.ErrorIs(t, err, status.ParamInvalid)
	require.Zero(t, table.Stats().Drawn)
	require.ErrorIs(t, table.Deallocate(1, false), status.FeatureNotEnabled)
	require.ErrorIs(t, table.RemoveKey(key(1)), status.FeatureNotEnabled)
	_, err = table.Register(rows(1, 1, 4), []uintptr{1}, nil, true)
	require.NoError(t, err)
	requireNothingLeft(t, table)

	hostOnly, err := NewTable(mem.Host(), nil, &PoolConfig{Bytes: 1 << 20, PageShift: 16})
	require.NoError(t, err)
	_, err = hostOnly.Allocate(rows(1, 1, 4), nil)
	require.ErrorIs(t, err, status.ParamInvalid, "no pool for DEVICE")
	require.NoError(t, hostOnly.Deallocate(1, false))
	requireNothingLeft(t, hostOnly)

}

func TestPoolsThatCannotBeHad(t *testing.T) {
	fine := &PoolConfig{Bytes: 1 << 20, PageShift: 16}
	for _, c := range []struct {
		config PoolConfig
		code   status.Code
	}{
		{PoolConfig{Bytes: 100, PageShift: 16}, status.ParamInvalid},
		{PoolConfig{Bytes: 1 << 20, PageShift: 9}, status.ParamInvalid},
		{PoolConfig{Bytes: 1 << 60, PageShift: 30}, status.OutOfMemory},
	} {
		_, err := NewTable(mem.Host(), &c.config, fine)
		require.ErrorIs(t, err, c.code)
		_, err = NewTable(mem.Host(), fine, &c.config)
		require.ErrorIs(t, err, c.code)
	}
}

func TestBackingOfRegisteredMemoryIsLookedUpOnce(t *testing.T) {
	table := newTable(t)
	buffer, err := mem.NewBuffer(1 << 16)
	require.NoError(t, err)
	e, err := table.Register(rows(1, 1, 1<<16), []uintptr{buffer.Addr()}, nil, true)
	require.NoError(t, err)
	backing := func(id int64) (mem.Backing, error) {
		use, err := table.Use(id)
		require.NoError(t, err)
		defer use.Release()
		require.Equal(t, id, use.Entry().ID)
		return use.Backing()
	}
	require.NoError(t, unix.Mprotect(buffer.Bytes(), unix.PROT_READ))
	_, err = backing(e.ID)
	require.ErrorIs(t, err, status.ParamInvalid)
	require.NoError(t, unix.Mprotect(buffer.Bytes(), unix.PROT_READ|unix.PROT_WRITE))
	got, err := backing(e.ID)
	require.NoError(t, err, "a failure is not kept")
	require.Equal(t, mem.BackingAnonymous, got)
	require.NoError(t, buffer.Free())
	got, err = backing(e.ID)
	require.NoError(t, err, "not looked up again")
	require.Equal(t, mem.BackingAnonymous, got)

	bad, err := table.Register(rows(1, 2, 4), []uintptr{1}, nil, true)
	require.NoError(t, err, "no address is looked at here")
	_, err = backing(bad.ID)
	require.ErrorIs(t, err, status.ParamInvalid)

	owned, err := table.Allocate(rows(1, 2, 4), nil)
	require.NoError(t, err)
	got, err = backing(owned.ID)
	require.NoError(t, err)
	require.Equal(t, mem.BackingAnonymous, got, "although it is a memfd")
	inPool, err := table.Register(rows(1, 2, 4), owned.Addrs, nil, true)
	require.NoError(t, err)
	got, err = backing(inPool.ID)
	require.NoError(t, err)
	require.Equal(t, mem.BackingFile, got)

	_, err = table.Use(99)
	require.ErrorIs(t, err, status.CacheNotExist)
	require.Equal(t, status.StageCheck, status.From(err, "").Stage)
}
