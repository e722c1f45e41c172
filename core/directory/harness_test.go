// SPDX-License-Identifier: Apache-2.0

package directory

import (
	"math"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/testkit"
)

func TestMain(m *testing.M) {
	if os.Getenv(ownerVariable) != "" {
		beOwner()
		return
	}
	os.Exit(m.Run())
}

// patient is longer than anything that works takes on a slow machine.
const patient = 20 * time.Second

// check fails the test when goroutines, descriptors or mappings are left at its end.
func check(t testing.TB) {
	goroutines, files, pages := runtime.NumGoroutine(), testkit.Descriptors(t), testkit.Mappings(t, "llm_datadist")
	t.Cleanup(func() {
		require.Eventually(t, func() bool {
			// Eventually runs this on a goroutine of its own.
			return runtime.NumGoroutine() <= goroutines+1 && testkit.Descriptors(t) <= files && testkit.Mappings(t, "llm_datadist") <= pages
		}, patient, time.Millisecond, "before: %d goroutines, %d descriptors, %d mappings", goroutines, files, pages)
	})
}

var us = [16]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}

// published makes a directory and a peer's view of it, through a mapping of its own.
func published(t testing.TB) (*Publisher, *Pages) {
	check(t)
	p, err := NewPublisher(us)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, p.Close()) })
	m := mapped(t, p.FD())
	pages, err := OpenPages(m, us)
	require.NoError(t, err)
	return p, pages
}

func mapped(t testing.TB, fd int) *mem.Mapping {
	own, err := mem.ReadOnly(fd)
	require.NoError(t, err)
	defer func() { require.NoError(t, unix.Close(own)) }()
	m, err := mem.MapShared(own, pagesBytes, mem.PagesSeals)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	return m
}

// record is what one may look like: all of it follows from generation and tensors.
func record(generation uint64, tensors uint32) Record {
	r := Record{
		ID: int64(generation) * 3, Generation: generation,
		Shape:      plan.Shape{Kind: plan.Contiguous, Tensors: tensors, TensorBytes: 1 << 20, Stride: 1 << 18, Count: 4},
		Accessible: generation%2 == 0, Pool: uint32(generation % 3), Addrs: make([]uintptr, tensors),
	}
	if generation%4 == 0 {
		r.Shape.Kind, r.HasKey, r.Model = plan.Blocks, true, generation/4
	}
	for i := range r.Addrs {
		r.Addrs[i] = uintptr(scatter(generation<<20+uint64(i)) >> 1)
	}
	return r
}

// scatter is the finalizer of splitmix64.
func scatter(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

func requireFound(t testing.TB, pages *Pages, want Record) Ref {
	got, ref, ok := pages.Find(want.Generation)
	require.True(t, ok)
	require.Equal(t, want, got)
	require.Equal(t, want.Generation, ref.Generation)
	require.True(t, pages.Live(ref))
	return ref
}

func requireMissing(t testing.TB, pages *Pages, generation uint64) {
	_, _, ok := pages.Find(generation)
	require.False(t, ok)
	for slot := range uint32(slots + 1) {
		if pages.Live(Ref{slot, generation}) {
			require.FailNow(t, "it is live", "generation %d in slot %d", generation, slot)
		}
	}
}

// requireSound checks what Find promises of whatever it finds.
func requireSound(t testing.TB, generation uint64, r Record, ref Ref) {
	require.NotZero(t, generation)
	require.Equal(t, generation, r.Generation)
	require.Equal(t, generation, ref.Generation)
	require.Less(t, ref.Slot, uint32(slots))
	s := r.Shape
	require.Contains(t, []plan.Kind{plan.Contiguous, plan.Blocks}, s.Kind)
	require.NotZero(t, s.Stride)
	require.NotZero(t, s.Count)
	require.Equal(t, s.TensorBytes, s.Stride*s.Count)
	require.Equal(t, s.Stride, s.TensorBytes/s.Count, "no overflow")
	require.LessOrEqual(t, s.TensorBytes, uint64(math.MaxInt64)/uint64(s.Tensors))
	require.Len(t, r.Addrs, int(s.Tensors))
	require.LessOrEqual(t, cap(r.Addrs), arenaWords)
	for _, addr := range r.Addrs {
		if s.TensorBytes > math.MaxUint64-uint64(addr) {
			require.Fail(t, "a tensor runs beyond the address space")
		}
	}
}
