// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// workload is a pull: segments of equal size from random places of a peer's pool to random places of ours.
type workload struct {
	name     string
	segments int
	bytes    uint64
}

var workloads = []workload{
	{"W1_4096x32KiB", 4096, 32 << 10},
	{"W2_64x32KiB", 64, 32 << 10},
	{"W3_1x16KiB", 1, 16 << 10},
}

const (
	// benchmarkSpan is the size of each pool: far more than a cache holds.
	benchmarkSpan = 1 << 30
	// benchmarkLists of moves are gone through in turn, 32 pulls that begin where the cache has nothing of them.
	benchmarkLists = 32
)

// scatter draws lists of segments that don't overlap inside of a list.
func (w workload) scatter(dst, src uintptr) (lists [benchmarkLists][]Move) {
	random := rand.New(rand.NewPCG(1, 2))
	slots := int(benchmarkSpan / w.bytes)
	for l := range lists {
		to, from := random.Perm(slots)[:w.segments], random.Perm(slots)[:w.segments]
		for i := range to {
			m := Move{Dst: dst + uintptr(to[i])*uintptr(w.bytes), Src: src + uintptr(from[i])*uintptr(w.bytes), Bytes: w.bytes}
			lists[l] = append(lists[l], m)
		}
	}
	return lists
}

func BenchmarkCrew(b *testing.B) {
	source, err := Host().Reserve(benchmarkSpan)
	require.NoError(b, err)
	defer func() { require.NoError(b, source.Close()) }()
	destination, err := NewBuffer(benchmarkSpan)
	require.NoError(b, err)
	defer func() { require.NoError(b, destination.Free()) }()
	for at := uint64(0); at < benchmarkSpan; at += page { // all pages are there
		View(source.Addr(), benchmarkSpan)[at] = 1
		destination.Bytes()[at] = 1
	}
	b.Logf("%+v", Calibrate())
	for _, w := range workloads {
		total := uint64(w.segments) * w.bytes
		lists := w.scatter(destination.Addr(), source.Addr())
		for name, method := range map[string]Method{"plain": plainStores{}, "streaming": streamingStores{}, "measured": Stores(total)} {
			for _, threads := range []int{1, 2} {
				b.Run(fmt.Sprintf("%s/%s/threads=%d", w.name, name, threads), func(b *testing.B) {
					crew := NewCrew(threads)
					defer crew.Close()
					b.SetBytes(int64(total))
					b.ResetTimer()
					took := make([]time.Duration, b.N)
					for i := range took {
						begin := time.Now()
						err := crew.Copy(context.Background(), lists[i%benchmarkLists], total, method)
						took[i] = time.Since(begin)
						require.NoError(b, err)
					}
					slices.Sort(took)
					b.ReportMetric(float64(took[len(took)/2])/1e3, "p50-us")
					b.ReportMetric(float64(took[0])/1e3, "best-us")
				})
			}
		}
	}
}
