// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/directory"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/testkit/device"
)

// onHost is a description of host memory.
func onHost(d Desc) Desc {
	d.Placement = Host
	return d
}

// A device's memory is known as such, is never looked up, and is nothing that a peer could map.
func TestATableKnowsWhatLiesOnItsDevice(t *testing.T) {
	fake := device.New()
	config := &PoolConfig{Bytes: testPool, PageShift: 16}
	table, err := NewTable(fake, config, config)
	require.NoError(t, err)
	require.Empty(t, table.SharedPools(), "pinned memory is none of ours either")
	require.Equal(t, 1, fake.Held())
	addr := make16(1)
	for _, c := range []struct {
		desc    Desc
		owned   bool
		device  bool
		backing mem.Backing
		space   directory.Space
	}{
		{desc: rows(1, 1, 4), device: true, backing: mem.BackingDevice, space: directory.Distant},
		{desc: rows(1, 1, 4), owned: true, device: true, backing: mem.BackingDevice, space: directory.Distant},
		{desc: onHost(rows(1, 1, 4)), backing: mem.BackingAnonymous, space: directory.Private},
		{desc: onHost(rows(1, 1, 4)), owned: true, backing: mem.BackingAnonymous, space: directory.Mapped},
	} {
		var e *Entry
		if c.owned {
			e, err = table.Allocate(c.desc, nil)
		} else {
			if !c.device {
				b, err := mem.NewBuffer(16)
				require.NoError(t, err)
				defer func() { require.NoError(t, b.Free()) }()
				addr = []uintptr{b.Addr()}
			}
			e, err = table.Register(c.desc, addr, nil, true)
		}
		require.NoError(t, err)
		source, err := table.Open(byID(e.ID, 0))
		require.NoError(t, err)
		require.Equal(t, c.device, source.OnDevice())
		source.Drop()
		use, err := table.Use(e.ID)
		require.NoError(t, err)
		backing, err := use.Backing()
		require.NoError(t, err)
		require.Equal(t, c.backing, backing)
		use.Release()
		located, ok := table.Directory().Lookup(e.Generation)
		require.True(t, ok)
		require.Equal(t, c.space, located.Space)
		require.NoError(t, table.Unregister(t.Context(), e.ID))
	}
	require.NoError(t, table.Close())
	require.Zero(t, fake.Held())
}

func TestSpansOnADeviceAndBesideIt(t *testing.T) {
	table, err := NewTable(device.New(), nil, nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, table.Close()) }()
	for i, desc := range []Desc{rows(1, 1, 64), rows(1, 1, 64), onHost(rows(1, 1, 64)), onHost(rows(1, 1, 64))} {
		_, err := table.Register(desc, []uintptr{uintptr(i+1) << 20}, nil, true)
		require.NoError(t, err)
	}
	span := func(i int) mem.Span { return mem.Span{Addr: uintptr(i+1) << 20, Bytes: 64} }
	for _, alike := range [][]mem.Span{{span(0), span(1)}, {span(2), span(3)}} {
		held, err := table.HoldSpans(t.Context(), alike, true)
		require.NoError(t, err)
		held.Release()
	}
	for _, mixed := range [][]mem.Span{{span(0), span(2)}, {span(3), span(1)}, {span(0), span(1), span(3)}} {
		_, err := table.HoldSpans(t.Context(), mixed, true)
		require.ErrorIs(t, err, status.ParamInvalid)
	}
	require.Zero(t, table.Stats().Uses)
}
