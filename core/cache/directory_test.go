// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/plan"
)

func TestDirectoryShowsAGenerationAsLongAsItsMemoryIsItsOwn(t *testing.T) {
	config := PoolConfig{Bytes: 1 << 20, PageShift: 12}
	table, err := NewTable(nil, &config, nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, table.Close()) }()
	directory := table.Directory()
	key := Key{ID: 1}
	desc := Desc{Kind: plan.Contiguous, Tensors: 2, Dims: []int64{1, 100}, ElementBytes: 1, Placement: Device}
	e, err := table.Allocate(desc, []Key{key})
	require.NoError(t, err)
	shape, addrs, live := directory.Lookup(e.Generation)
	require.True(t, live)
	require.Equal(t, e.Shape, shape)
	require.Equal(t, e.Addrs, addrs)
	require.True(t, directory.Named(e.Generation))
	require.False(t, directory.Live(e.Generation+1))

	lease, err := table.Open(Lookup{Key: key})
	require.NoError(t, err)
	require.True(t, lease.Consumes())
	require.NoError(t, table.RemoveKey(key))
	require.NoError(t, table.Deallocate(e.ID, false))
	require.False(t, directory.Named(e.Generation), "nothing leads to it any more")
	require.True(t, directory.Live(e.Generation), "a lease holds it")
	lease.Drop()
	require.False(t, directory.Live(e.Generation))
	_, _, live = directory.Lookup(e.Generation)
	require.False(t, live)
}

func TestDirectoryEndsAGenerationBeforeUnregisterReturns(t *testing.T) {
	config := PoolConfig{Bytes: 1 << 20, PageShift: 12}
	table, err := NewTable(nil, &config, nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, table.Close()) }()
	desc := Desc{Kind: plan.Contiguous, Tensors: 1, Dims: []int64{1, 100}, ElementBytes: 1, Placement: Device}
	e, err := table.Allocate(desc, []Key{{ID: 1}})
	require.NoError(t, err)
	lease, err := table.Open(Lookup{Key: Key{ID: 1}})
	require.NoError(t, err)
	require.NoError(t, table.Unregister(context.Background(), e.ID))
	require.False(t, table.Directory().Live(e.Generation), "not even under a lease")
	lease.Drop()
}
