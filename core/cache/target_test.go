// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"context"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

func TestWhatAPushNamesIsHeld(t *testing.T) {
	table := newTable(t)
	owned, err := table.Allocate(rows(1, 2, 4), []Key{key(0), key(11)})
	require.NoError(t, err)
	paged, err := table.Register(blocks(1, 4, 4), make16(1), []Key{{ID: NoID, Model: 7}}, true)
	require.NoError(t, err)
	hidden, err := table.Register(rows(1, 2, 4), make16(1), []Key{key(30)}, false)
	require.NoError(t, err)
	const missing, denied = status.CacheNotExist, status.ParamInvalid
	for _, c := range []struct {
		name     string
		lookup   Lookup
		oneSided bool
		code     status.Code
		want     *Entry
	}{
		{"id", byID(owned.ID, 1), true, 0, owned},
		{"id, whatever the row", byID(owned.ID, 5), true, 0, owned},
		{"id in two-sided mode", byID(owned.ID, 1), false, 0, owned},
		{"unknown id", byID(99, 0), true, missing, nil},
		{"id 0 is the key (0, 0)", byID(0, 1), true, 0, owned},
		{"id 0 in two-sided mode", byID(0, 1), false, missing, nil},
		{"blocks key", byKey(Key{ID: NoID, Model: 7}), true, 0, paged},
		{"unknown key", byKey(Key{ID: NoID, Model: 8}), true, missing, nil},
		{"not accessible", byID(hidden.ID, 0), true, denied, nil},
		{"not accessible in two-sided mode", byKey(key(30)), false, 0, hidden},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.lookup.OneSided = c.oneSided
			var use Use
			err := table.HoldTarget(c.lookup, &use)
			if c.code != status.Success {
				require.ErrorIs(t, err, c.code)
				require.Zero(t, table.Stats().Uses)
				return
			}
			require.NoError(t, err)
			require.Same(t, c.want, use.Entry())
			require.EqualValues(t, 1, table.Stats().Uses)
			require.Zero(t, table.Stats().Leases, "nothing is consumed")
			use.Release()
		})
	}
}

func TestRawAddressesMustLieInsideOneTensorOfALiveCache(t *testing.T) {
	table := newTable(t)
	first, err := table.Register(rows(2, 1, 100), []uintptr{1000, 1100}, nil, true) // neighbours
	require.NoError(t, err)
	second, err := table.Register(rows(1, 1, 50), []uintptr{5000}, nil, false)
	require.NoError(t, err)
	_, err = table.Register(rows(1, 1, 64), []uintptr{^uintptr(0) - 8}, nil, true)
	require.NoError(t, err)
	allocated, err := table.Allocate(rows(1, 1, 100), nil)
	require.NoError(t, err)
	pool := allocated.Addrs[0]
	span := func(addr uintptr, bytes uint64) mem.Span { return mem.Span{Addr: addr, Bytes: bytes} }
	for _, c := range []struct {
		name  string
		spans []mem.Span
		good  bool
		held  int
	}{
		{"a tensor", []mem.Span{span(1000, 100)}, true, 1},
		{"within a tensor", []mem.Span{span(1010, 20)}, true, 1},
		{"two tensors of a cache", []mem.Span{span(1000, 100), span(1100, 100)}, true, 1},
		{"of three caches", []mem.Span{span(5000, 10), span(1100, 10), span(pool, 10)}, true, 3},
		{"before", []mem.Span{span(999, 10)}, false, 0},
		{"after", []mem.Span{span(5050, 1)}, false, 0},
		{"over the end", []mem.Span{span(5000, 51)}, false, 0},
		{"over two tensors", []mem.Span{span(1090, 20)}, false, 0},
		{"one of two", []mem.Span{span(1000, 100), span(3000, 1)}, false, 0},
		{"a length without end", []mem.Span{span(1000, 1<<64-1)}, false, 0},
		{"beyond the address space", []mem.Span{span(^uintptr(0)-8, 4)}, false, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			held, err := table.HoldSpans(t.Context(), c.spans, false)
			require.Len(t, held, c.held)
			require.EqualValues(t, c.held, table.Stats().Uses)
			if c.good {
				require.NoError(t, err)
			} else {
				require.ErrorIs(t, err, status.ParamInvalid)
				require.Equal(t, status.StageLookup, status.From(err, "").Stage)
			}
			held.Release()
			held.Release()
			require.Zero(t, table.Stats().Uses)
		})
	}
	_, err = table.HoldSpans(t.Context(), []mem.Span{span(5000, 10)}, true)
	require.ErrorIs(t, err, status.ParamInvalid)
	require.Contains(t, err.Error(), "not accessible")

	require.NoError(t, table.Unregister(t.Context(), first.ID))
	_, err = table.HoldSpans(t.Context(), []mem.Span{span(1000, 100)}, false)
	require.ErrorIs(t, err, status.ParamInvalid, "it is no cache's any more")
	require.NoError(t, table.Unregister(t.Context(), second.ID))
}

func TestTheMostCarefulBackingCounts(t *testing.T) {
	table := newTable(t)
	buffer, err := mem.NewBuffer(1 << 16)
	require.NoError(t, err)
	allocated, err := table.Allocate(rows(1, 1, 1<<16), nil)
	require.NoError(t, err)
	private, err := table.Register(rows(1, 1, 1<<16), []uintptr{buffer.Addr()}, nil, true)
	require.NoError(t, err)
	backing := func(addrs ...uintptr) (mem.Backing, error) {
		var spans []mem.Span
		for _, addr := range addrs {
			spans = append(spans, mem.Span{Addr: addr, Bytes: 10})
		}
		held, err := table.HoldSpans(t.Context(), spans, false)
		require.NoError(t, err)
		defer held.Release()
		return held.Backing()
	}
	got, err := backing(private.Addrs[0], allocated.Addrs[0])
	require.NoError(t, err)
	require.Equal(t, mem.BackingAnonymous, got)

	file, err := table.Register(rows(1, 1, 100), []uintptr{allocated.Addrs[0] + 1<<15}, nil, true) // a pool is a memfd
	require.NoError(t, err)
	require.NoError(t, table.Deallocate(allocated.ID, false))
	got, err = backing(file.Addrs[0], private.Addrs[0])
	require.NoError(t, err)
	require.Equal(t, mem.BackingFile, got)

	other, err := mem.NewBuffer(1 << 16)
	require.NoError(t, err)
	closed, err := table.Register(rows(1, 1, 1<<16), []uintptr{other.Addr()}, nil, true)
	require.NoError(t, err)
	require.NoError(t, unix.Mprotect(other.Bytes(), unix.PROT_READ))
	_, err = backing(private.Addrs[0], closed.Addrs[0])
	require.ErrorIs(t, err, status.ParamInvalid)
	require.NoError(t, buffer.Free())
	require.NoError(t, other.Free())
}

func TestWhatIsWrittenForAPeerEndsWithItsDestination(t *testing.T) {
	for name, end := range map[string]func(table *Table, e *Entry) error{
		"unregistered": func(table *Table, e *Entry) error { return table.Unregister(context.Background(), e.ID) },
		"finalized":    func(table *Table, _ *Entry) error { return table.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			table := newTable(t)
			synctest.Test(t, func(t *testing.T) {
				e, err := table.Register(rows(1, 1, 100), []uintptr{1000}, nil, true)
				require.NoError(t, err)
				held, err := table.HoldSpans(t.Context(), []mem.Span{{Addr: 1000, Bytes: 100}}, false)
				require.NoError(t, err)
				ctx, done := held.Within(t.Context())
				require.NoError(t, ctx.Err())
				ended := make(chan error)
				go func() { ended <- end(table, e) }()
				<-ctx.Done()
				require.ErrorIs(t, context.Cause(ctx), status.CacheNotExist)
				done()
				held.Release()
				require.NoError(t, <-ended)
			})
		})
	}
	t.Run("deallocated", func(t *testing.T) {
		table := newTable(t)
		e, err := table.Allocate(rows(1, 1, 100), nil)
		require.NoError(t, err)
		held, err := table.HoldSpans(t.Context(), []mem.Span{{Addr: e.Addrs[0], Bytes: 100}}, false)
		require.NoError(t, err)
		ctx, done := held.Within(t.Context())
		require.NoError(t, table.Deallocate(e.ID, false))
		require.NoError(t, ctx.Err(), "the memory stays until it is released")
		require.NotZero(t, table.Stats().PoolBytes)
		done()
		held.Release()
		require.Zero(t, table.Stats().PoolBytes)
	})
}
