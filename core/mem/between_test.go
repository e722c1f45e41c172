// SPDX-License-Identifier: Apache-2.0

package mem_test

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/testkit/device"
)

// betweenBytes is more than the scratch holds, and no multiple of it.
const betweenBytes = 3<<20 + 77

// halves are two moves over all bytes, the second half first.
func halves(dst, src uintptr) []mem.Move {
	const half = betweenBytes / 2
	return []mem.Move{{Dst: dst + half, Src: src + half, Bytes: betweenBytes - half}, {Dst: dst, Src: src, Bytes: half}}
}

// The fake device refuses host memory that may not be there, and nobody else can touch its own.
func TestCopiesBetweenADeviceAndAnyHostMemory(t *testing.T) {
	fake := device.New()
	there, err := fake.Reserve(betweenBytes)
	require.NoError(t, err)
	defer func() { require.NoError(t, there.Close()) }()
	here, err := mem.NewBuffer(2 * betweenBytes)
	require.NoError(t, err)
	defer func() { require.NoError(t, here.Free()) }()
	content, back := here.Bytes()[:betweenBytes], here.Bytes()[betweenBytes:]
	for _, backing := range []mem.Backing{mem.BackingAnonymous, mem.BackingFile} {
		_, _ = rand.NewChaCha8([32]byte{byte(backing)}).Read(content)
		clear(back)
		require.NoError(t, mem.CopyBetween(fake, halves(there.Addr(), here.Addr()), mem.BackingDevice, backing, 2))
		require.True(t, bytes.Equal(content, fake.View(there.Addr(), betweenBytes)))
		require.NoError(t, mem.CopyBetween(fake, halves(here.Addr()+betweenBytes, there.Addr()), backing, mem.BackingDevice, 2))
		require.True(t, bytes.Equal(content, back))
	}
	clear(back)
	require.NoError(t, mem.CopyBetween(fake, halves(here.Addr()+betweenBytes, here.Addr()), mem.BackingFile, mem.BackingAnonymous, 1))
	require.True(t, bytes.Equal(content, back), "no device on either side")
}

func TestCopiesBetweenADeviceAndNothing(t *testing.T) {
	fake := device.New()
	there, err := fake.Reserve(100)
	require.NoError(t, err)
	defer func() { require.NoError(t, there.Close()) }()
	const nowhere = 1 << 12
	for _, m := range []struct {
		move     mem.Move
		to, from mem.Backing
	}{
		{mem.Move{Dst: there.Addr(), Src: nowhere, Bytes: 100}, mem.BackingDevice, mem.BackingFile},
		{mem.Move{Dst: nowhere, Src: there.Addr(), Bytes: 100}, mem.BackingFile, mem.BackingDevice},
		{mem.Move{Dst: there.Addr(), Src: there.Addr() + 50, Bytes: 51}, mem.BackingDevice, mem.BackingDevice},
		{mem.Move{Dst: there.Addr(), Src: there.Addr(), Bytes: 100}, mem.BackingFile, mem.BackingFile}, // which says the wrong thing
	} {
		require.ErrorIs(t, mem.CopyBetween(fake, []mem.Move{m.move}, m.to, m.from, 1), status.ParamInvalid)
	}
}
