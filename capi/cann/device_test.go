// SPDX-License-Identifier: Apache-2.0

package cann

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// device is the one that tests use; the stand-in has two.
var device = NewDevice(0)

// noise is content that depends on seed alone.
func noise(bytes int, seed uint64) []byte {
	out := make([]byte, bytes)
	source := rand.New(rand.NewPCG(seed, 0))
	for i := range out {
		out[i] = byte(source.Uint32())
	}
	return out
}

// reserve obtains memory of the device, or pinned memory, until the test ends.
func reserve(t *testing.T, onDevice bool, bytes int) mem.Memory {
	t.Helper()
	obtain := device.ReserveHost
	if onDevice {
		obtain = device.Reserve
	}
	memory, err := obtain(uint64(bytes))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, memory.Close()) })
	return memory
}

func backing(onDevice bool) mem.Backing {
	if onDevice {
		return mem.BackingDevice
	}
	return mem.BackingAnonymous
}

// buffer is ordinary memory of the host, with content.
func buffer(t *testing.T, content []byte) *mem.Buffer {
	t.Helper()
	b, err := mem.NewBuffer(len(content))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, b.Free()) })
	copy(b.Bytes(), content)
	return b
}

func write(t *testing.T, to uintptr, onDevice bool, content []byte) {
	t.Helper()
	moves := []mem.Move{{Dst: to, Src: buffer(t, content).Addr(), Bytes: uint64(len(content))}}
	require.NoError(t, device.Copy(moves, backing(onDevice), mem.BackingAnonymous, 1))
}

func fetch(t *testing.T, from uintptr, onDevice bool, bytes int) []byte {
	t.Helper()
	b := buffer(t, make([]byte, bytes))
	moves := []mem.Move{{Dst: b.Addr(), Src: from, Bytes: uint64(bytes)}}
	require.NoError(t, device.Copy(moves, mem.BackingAnonymous, backing(onDevice), 1))
	return b.Bytes()[:bytes]
}

func TestDevicesAreCounted(t *testing.T) {
	count, err := Devices()
	require.NoError(t, err)
	require.Equal(t, 2, count)
	planFaults(t, "aclrtGetDeviceCount=fail:4711")
	_, err = Devices()
	require.ErrorIs(t, err, status.Failed)
	require.ErrorContains(t, err, "aclrtGetDeviceCount: the runtime's error 4711")
}

func TestDeviceSaysWhatItIs(t *testing.T) {
	require.Equal(t, "cann", device.Name())
	require.True(t, device.Apart())
}

func TestReservations(t *testing.T) {
	for name, obtain := range map[string]func(bytes uint64) (mem.Memory, error){"device": device.Reserve, "host": device.ReserveHost} {
		t.Run(name, func(t *testing.T) {
			memory, err := obtain(5000)
			require.NoError(t, err)
			require.Equal(t, uint64(5000), memory.Bytes())
			content := noise(5000, 1)
			write(t, memory.Addr(), name == "device", content)
			require.NoError(t, memory.Discard(0, 4096))
			require.Equal(t, content, fetch(t, memory.Addr(), name == "device", 5000), "discarding does nothing")
			require.NoError(t, memory.Close())
			require.NoError(t, memory.Close())

			_, err = obtain(0)
			require.ErrorIs(t, err, status.ParamInvalid)
		})
	}
	host := reserve(t, false, 100)
	copy(mem.View(host.Addr(), 100), noise(100, 2))
	require.Equal(t, noise(100, 2), fetch(t, host.Addr(), false, 100), "pinned memory is the host's too")
}

func TestReservationsThatFail(t *testing.T) {
	_, err := device.Reserve(deviceBytes + 1)
	require.ErrorIs(t, err, status.OutOfMemory)
	require.ErrorContains(t, err, fmt.Sprintf("reserve %d bytes of device memory, device 0: aclrtMalloc: the runtime's error", deviceBytes+1))

	_, err = NewDevice(9).Reserve(1)
	require.ErrorIs(t, err, status.OutOfMemory)
	require.ErrorContains(t, err, "device 9: aclrtSetDevice(9): the runtime's error")

	planFaults(t, "aclrtMalloc=fail:507899 aclrtMallocHost=fail:507898")
	_, err = device.Reserve(1)
	require.ErrorIs(t, err, status.OutOfMemory)
	require.ErrorContains(t, err, "507899")
	_, err = device.ReserveHost(1)
	require.ErrorIs(t, err, status.OutOfMemory)
	require.ErrorContains(t, err, "507898")
}

func TestCloseThatFailsIsToldAndNotTriedAgain(t *testing.T) {
	onDevice, err := device.Reserve(1)
	require.NoError(t, err)
	host, err := device.ReserveHost(1)
	require.NoError(t, err)
	planFaults(t, "aclrtFree=late:77:0 aclrtFreeHost=late:78:0") // freed, and told to have failed
	for range 2 {
		err = onDevice.Close()
		require.ErrorIs(t, err, status.Failed)
		require.ErrorContains(t, err, "aclrtFree: the runtime's error 77")
		require.Equal(t, status.StageClose, status.From(err, "").Stage)
		require.ErrorContains(t, host.Close(), "aclrtFreeHost: the runtime's error 78")
	}
}

// TestCopiesOfEachKind moves pieces of uneven sizes, more than one batch of them, from the host through the device and back.
func TestCopiesOfEachKind(t *testing.T) {
	const pieces = 5*batchMoves + 3
	content := noise(100_000, 3)
	source, back := buffer(t, content), buffer(t, make([]byte, len(content)))
	first, second := reserve(t, true, len(content)), reserve(t, true, len(content))
	moves := func(dst, src uintptr) (out []mem.Move) {
		whole := len(content) / pieces
		for i := range pieces {
			at := uintptr(i * whole)
			bytes := uint64(whole)
			if i == pieces-1 {
				bytes = uint64(len(content)) - uint64(at)
			}
			out = append(out, mem.Move{}, mem.Move{Dst: dst + at, Src: src + at, Bytes: bytes})
		}
		return out
	}
	require.NoError(t, device.Copy(moves(first.Addr(), source.Addr()), mem.BackingDevice, mem.BackingAnonymous, 4))
	require.NoError(t, device.Copy(moves(second.Addr(), first.Addr()), mem.BackingDevice, mem.BackingDevice, 4))
	require.NoError(t, device.Copy(moves(back.Addr(), second.Addr()), mem.BackingAnonymous, mem.BackingDevice, 4))
	require.Equal(t, content, back.Bytes()[:len(content)])

	require.NoError(t, device.Copy(nil, mem.BackingDevice, mem.BackingDevice, 1))
	require.NoError(t, device.Copy([]mem.Move{{}}, mem.BackingDevice, mem.BackingDevice, 1))
}

func TestCopiesAreMadeInOrder(t *testing.T) {
	const places = 3 * batchMoves
	memory := reserve(t, true, places+1)
	content := noise(places+1, 4)
	write(t, memory.Addr(), true, content)
	var moves []mem.Move
	for i := range uintptr(places) { // each reads what the one before has written
		moves = append(moves, mem.Move{Dst: memory.Addr() + i + 1, Src: memory.Addr() + i, Bytes: 1})
	}
	require.NoError(t, device.Copy(moves, mem.BackingDevice, mem.BackingDevice, 4))
	for _, b := range fetch(t, memory.Addr(), true, places+1) {
		require.Equal(t, content[0], b)
	}
}

func TestCopiesBesideTheDevice(t *testing.T) {
	content := noise(3*4096, 5)
	file, err := mem.Host().Reserve(uint64(len(content)))
	require.NoError(t, err)
	defer func() { require.NoError(t, file.Close()) }()
	memory, source, back := reserve(t, true, len(content)), buffer(t, content), buffer(t, make([]byte, len(content)))
	whole := func(dst, src uintptr) []mem.Move {
		return []mem.Move{{Dst: dst, Src: src, Bytes: uint64(len(content))}}
	}

	err = device.Copy(whole(memory.Addr(), file.Addr()), mem.BackingDevice, mem.BackingFile, 1)
	require.ErrorIs(t, err, status.Failed, "the runtime is given no memory that may vanish")
	err = device.Copy(whole(file.Addr(), memory.Addr()), mem.BackingFile, mem.BackingDevice, 1)
	require.ErrorIs(t, err, status.Failed)

	require.NoError(t, device.Copy(whole(file.Addr(), source.Addr()), mem.BackingFile, mem.BackingAnonymous, 1))
	require.NoError(t, mem.CopyBetween(device, whole(memory.Addr(), file.Addr()), mem.BackingDevice, mem.BackingFile, 1))
	require.NoError(t, file.Discard(0, file.Bytes()))
	require.NoError(t, mem.CopyBetween(device, whole(file.Addr(), memory.Addr()), mem.BackingFile, mem.BackingDevice, 1))
	require.NoError(t, device.Copy(whole(back.Addr(), file.Addr()), mem.BackingAnonymous, mem.BackingFile, 1))
	require.Equal(t, content, back.Bytes()[:len(content)])
}

func TestCopiesThatFail(t *testing.T) {
	memory := reserve(t, true, 3)
	write(t, memory.Addr(), true, []byte{0, 0, 0})
	source := buffer(t, []byte{1, 2, 3})
	var moves []mem.Move
	for i := range uintptr(3) {
		moves = append(moves, mem.Move{Dst: memory.Addr() + i, Src: source.Addr() + i, Bytes: 1})
	}
	planFaults(t, "aclrtMemcpy=late:0:0 aclrtMemcpy=fail:4712")
	err := device.Copy(moves, mem.BackingDevice, mem.BackingAnonymous, 1)
	require.ErrorIs(t, err, status.Failed)
	require.ErrorContains(t, err, "aclrtMemcpy: the runtime's error 4712")
	require.Equal(t, status.StageTransfer, status.From(err, "").Stage)
	require.Equal(t, []byte{1, 0, 0}, fetch(t, memory.Addr(), true, 3), "the first failure ends a copy")

	planFaults(t, "aclrtMemcpy=fail:507053")
	require.ErrorIs(t, device.Copy(moves, mem.BackingDevice, mem.BackingAnonymous, 1), status.DeviceMemError)

	gone, err := device.Reserve(4096)
	require.NoError(t, err)
	require.NoError(t, gone.Close())
	moves = []mem.Move{{Dst: gone.Addr(), Src: source.Addr(), Bytes: 3}}
	err = device.Copy(moves, mem.BackingDevice, mem.BackingAnonymous, 1)
	require.ErrorIs(t, err, status.Failed)
	require.ErrorContains(t, err, "aclrtMemcpy: the runtime's error 900006")
	require.ErrorContains(t, NewDevice(9).Copy(moves, mem.BackingDevice, mem.BackingAnonymous, 1), "aclrtSetDevice(9)")
}

func TestCopyAllocatesNothingForAMove(t *testing.T) {
	memory, source := reserve(t, true, 1), buffer(t, []byte{1})
	moves := make([]mem.Move, 20*batchMoves)
	for i := range moves {
		moves[i] = mem.Move{Dst: memory.Addr(), Src: source.Addr(), Bytes: 1}
	}
	const most = 4 // the batch itself, where the pool has none
	require.LessOrEqual(t, testing.AllocsPerRun(10, func() {
		require.NoError(t, device.Copy(moves, mem.BackingDevice, mem.BackingAnonymous, 1))
	}), float64(most))
}
