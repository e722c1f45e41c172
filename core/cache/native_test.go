// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

func TestALeaseThatIsAskedForKeepsTheMemoryAndReleasesNothing(t *testing.T) {
	table := newTable(t)
	e, err := table.Allocate(rows(1, 1, 4), []Key{key(1)})
	require.NoError(t, err)
	asked, err := table.Open(Lookup{ByID: true, CacheID: e.ID, OneSided: true, Lease: true})
	require.NoError(t, err)
	require.False(t, asked.Consumes())
	require.EqualValues(t, 1, table.Stats().Leases)
	require.NoError(t, table.Deallocate(e.ID, false))
	require.NoError(t, table.RemoveKey(key(1)))
	require.NotZero(t, table.Stats().PoolBytes, "the lease keeps it")
	require.True(t, asked.Done(all), "withdrawn, but the memory stayed its own")
	requireFree(t, table)

	e, err = table.Allocate(rows(1, 1, 4), []Key{key(1)})
	require.NoError(t, err)
	asked, err = table.Open(Lookup{ByID: true, CacheID: e.ID, OneSided: true, Lease: true})
	require.NoError(t, err)
	require.True(t, asked.Done(all))
	bound, err := table.Open(byKey(key(1)))
	require.NoError(t, err, "its key is bound still")
	bound.Drop()
}

func TestALeaseOnWhatIsUnregisteredIsNoGood(t *testing.T) {
	table := newTable(t)
	e, err := table.Register(rows(1, 1, 4), []uintptr{1 << 12}, nil, true)
	require.NoError(t, err)
	asked, err := table.Open(Lookup{ByID: true, CacheID: e.ID, Lease: true})
	require.NoError(t, err)
	require.NoError(t, table.Unregister(context.Background(), e.ID), "nobody waits for a peer")
	require.False(t, asked.Done(all))
	requireFree(t, table)
}

func TestANameInALibraryIsTakenBackWhenTheLastOneHasLetGo(t *testing.T) {
	table := newTable(t)
	var gone []int64
	var bytes uint64
	table.Leaving(func(native int64) {
		gone = append(gone, native)
		bytes = table.Stats().PoolBytes // so the table's lock is free
	})
	e, err := table.Allocate(rows(1, 1, 4), nil)
	require.NoError(t, err)
	require.Zero(t, e.Native())
	require.True(t, e.Enroll(17))
	require.EqualValues(t, 17, e.Native())
	use, err := table.Use(e.ID)
	require.NoError(t, err)
	require.EqualValues(t, 17, use.Native())
	require.NoError(t, table.Deallocate(e.ID, false))
	require.Empty(t, gone)
	use.Release()
	require.Equal(t, []int64{17}, gone)
	require.NotZero(t, bytes, "before the memory is given back")
	require.Zero(t, e.Native())
	require.False(t, e.Enroll(18), "the one who comes too late takes its name back itself")

	unnamed, err := table.Allocate(rows(1, 1, 4), nil)
	require.NoError(t, err)
	require.NoError(t, table.Unregister(context.Background(), unnamed.ID))
	require.Equal(t, []int64{17}, gone)
	requireFree(t, table)
}

func TestADetainedCacheCanBeFreedAndNothingElse(t *testing.T) {
	table := newTable(t)
	e, err := table.Allocate(rows(1, 1, 4), []Key{key(1)})
	require.NoError(t, err)
	use, err := table.Use(e.ID)
	require.NoError(t, err)
	release := use.Detain()
	use.Release()

	refused := func() {
		t.Helper()
		_, err := table.Use(e.ID)
		require.ErrorIs(t, err, status.Failed)
		require.ErrorContains(t, err, "outlived its deadline")
		_, err = table.Open(byKey(key(1)))
		require.ErrorIs(t, err, status.Failed)
		require.ErrorIs(t, table.HoldTarget(byID(e.ID, 0), new(Use)), status.Failed)
		_, err = table.HoldSpans(context.Background(), []mem.Span{{Addr: e.Addrs[0], Bytes: 4}}, false)
		require.ErrorIs(t, err, status.Failed)
	}
	refused()
	release()
	use, err = table.Use(e.ID)
	require.NoError(t, err)

	release, again := use.Detain(), use.Detain()
	use.Release()
	release()
	refused()
	require.NoError(t, table.RemoveKey(key(1)))
	require.NoError(t, table.Deallocate(e.ID, false))
	require.NotZero(t, table.Stats().PoolBytes, "it may still be written")
	require.NoError(t, table.Close())
	require.NotZero(t, table.Stats().Retiring)
	again()
	require.Zero(t, table.Stats().Retiring)
}
