// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

var all = Range{All: true}

// shape describes a cache of INT8 tensors.
func shape(kind Kind, tensors uint32, count, stride uint64) Shape {
	return Shape{Kind: kind, Tensors: tensors, TensorBytes: count * stride, Stride: stride, Count: count}
}

func TestWorkedExamples(t *testing.T) { // spec §8.5.4
	for _, c := range []struct {
		name     string
		src, dst Shape
		req      Request
		want     []Segment
		cause    string
	}{
		{"size and both batches", shape(Contiguous, 1, 2, 4), shape(Contiguous, 1, 3, 4),
			Request{SrcBatch: 1, DstBatch: 2, Size: 3}, []Segment{{SrcOffset: 4, DstOffset: 8, Bytes: 3}}, ""},
		{"remote row too short", shape(Contiguous, 1, 2, 4), shape(Contiguous, 1, 2, 6),
			Request{Size: -1}, nil, "size 6 is larger than the remote row of 4 bytes"},
		{"the local row decides", shape(Contiguous, 1, 2, 6), shape(Contiguous, 1, 2, 4),
			Request{SrcBatch: 1, Size: -1}, []Segment{{SrcOffset: 6, Bytes: 4}}, ""},
		{"row into blocks", shape(Contiguous, 1, 2, 8), shape(Blocks, 1, 4, 4),
			Request{SrcBatch: 1, DstBlocks: []uint64{3, 0}},
			[]Segment{{SrcOffset: 8, DstOffset: 12, Bytes: 4}, {SrcOffset: 12, DstOffset: 0, Bytes: 4}}, ""},
		{"row into blocks with a tail, neighbours merged", shape(Contiguous, 1, 1, 10), shape(Blocks, 1, 4, 4),
			Request{DstBlocks: []uint64{2, 0, 1}},
			[]Segment{{SrcOffset: 0, DstOffset: 8, Bytes: 4}, {SrcOffset: 4, DstOffset: 0, Bytes: 6}}, ""},
		{"part of a row: whole pieces, as the [rec] has it", shape(Contiguous, 1, 1, 10), shape(Blocks, 1, 4, 4),
			Request{DstBlocks: []uint64{2, 0}},
			[]Segment{{SrcOffset: 0, DstOffset: 8, Bytes: 4}, {SrcOffset: 4, DstOffset: 0, Bytes: 4}}, ""},
		{"blocks with a merged run", shape(Blocks, 1, 8, 4), shape(Blocks, 1, 4, 4),
			Request{SrcBlocks: []uint64{5, 6, 1}, DstBlocks: []uint64{0, 1, 3}},
			[]Segment{{SrcOffset: 20, DstOffset: 0, Bytes: 8}, {SrcOffset: 4, DstOffset: 12, Bytes: 4}}, ""},
		{"offsets", shape(Contiguous, 1, 2, 8), shape(Contiguous, 1, 2, 6),
			Request{SrcBatch: 1, DstBatch: 1, SrcOffset: 3, DstOffset: 2, Size: -1, Exact: true},
			[]Segment{{SrcOffset: 11, DstOffset: 8, Bytes: 4}}, ""},
		{"an offset beyond the remote row", shape(Contiguous, 1, 2, 4), shape(Contiguous, 1, 2, 4),
			Request{SrcOffset: 2, Size: 3, Exact: true}, nil, "size 3 is larger than the remote row of 4 bytes from offset 2"},
		{"the whole row", shape(Contiguous, 1, 2, 4), shape(Contiguous, 1, 2, 6),
			Request{SrcBatch: 1, DstBatch: 1, Size: 1, Whole: true}, []Segment{{SrcOffset: 4, DstOffset: 6, Bytes: 4}}, ""},
		{"a whole row that does not fit", shape(Contiguous, 1, 2, 6), shape(Contiguous, 1, 2, 4),
			Request{Size: 1, Whole: true}, nil, "the remote row of 6 bytes is larger than the local row of 4 bytes"},
		{"layer ranges", shape(Contiguous, 4, 1, 4), shape(Contiguous, 4, 1, 4),
			Request{SrcTensors: Range{First: 0, Count: 2}, DstTensors: Range{First: 2, Count: 2}, Size: -1},
			[]Segment{{SrcTensor: 0, DstTensor: 2, Bytes: 4}, {SrcTensor: 1, DstTensor: 3, Bytes: 4}}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.req.SrcTensors == (Range{}) {
				c.req.SrcTensors, c.req.DstTensors = all, all
			}
			got, err := Build(&c.req, c.src, c.dst, nil)
			if c.cause != "" {
				requireError(t, err, status.ParamInvalid, status.StageLookup, c.cause)
				require.Empty(t, got)
				return
			}
			require.NoError(t, err)
			require.Equal(t, c.want, got)
			verify(t, &c.req, c.src, c.dst)
		})
	}
}

func requireError(t *testing.T, err error, code status.Code, stage status.Stage, cause string) {
	t.Helper()
	var e *status.Error
	require.ErrorAs(t, err, &e)
	require.Equal(t, code, e.Code)
	require.Equal(t, stage, e.Stage)
	require.Equal(t, cause, e.Cause)
}

func TestRefusals(t *testing.T) {
	row, blocks := shape(Contiguous, 4, 2, 16), shape(Blocks, 4, 8, 4)
	const max = math.MaxUint64
	for _, c := range []struct {
		cause    string
		src, dst Shape
		req      Request
		code     status.Code
		stage    status.Stage
	}{
		{"destination batch 2 is outside the local cache of 2 batches", row, row,
			Request{DstBatch: 2, Size: -1}, status.ParamInvalid, status.StageCheck},
		{"size 17 is larger than the local row of 16 bytes", row, row, Request{Size: 17}, status.ParamInvalid, status.StageCheck},
		{"size 13 is larger than the local row of 16 bytes from offset 4", row, row,
			Request{Size: 13, DstOffset: 4}, status.ParamInvalid, status.StageCheck},
		{"destination offset 16 is outside the local row of 16 bytes", row, row,
			Request{Size: -1, DstOffset: 16}, status.ParamInvalid, status.StageCheck},
		{"size 1 is larger than the remote row of 16 bytes from offset 18446744073709551615", row, row,
			Request{Size: 1, SrcOffset: max}, status.ParamInvalid, status.StageLookup},
		{"size 0 is neither -1 nor positive", row, row, Request{}, status.ParamInvalid, status.StageCheck},
		{"size -9223372036854775808 is neither -1 nor positive", row, row,
			Request{Size: math.MinInt64}, status.ParamInvalid, status.StageCheck},
		{"a pull without destination blocks into a local cache of blocks", row, blocks,
			Request{Size: -1}, status.ParamInvalid, status.StageCheck},
		{"1 destination blocks, but the local cache is not one of blocks", row, row,
			Request{DstBlocks: []uint64{0}}, status.ParamInvalid, status.StageCheck},
		{"2 source blocks but no destination blocks", blocks, row,
			Request{SrcBlocks: []uint64{0, 1}, Size: -1}, status.ParamInvalid, status.StageCheck},
		{"2 source blocks for 1 destination blocks", blocks, blocks,
			Request{SrcBlocks: []uint64{0, 1}, DstBlocks: []uint64{0}}, status.ParamInvalid, status.StageCheck},
		{"destination block 8 is outside the local cache of 8 blocks", blocks, blocks,
			Request{SrcBlocks: []uint64{0}, DstBlocks: []uint64{8}}, status.ParamInvalid, status.StageCheck},
		{"destination tensor 4 is outside the local cache of 4 tensors", row, row,
			Request{SrcTensors: all, DstTensors: Range{First: 3, Count: 2}, Size: -1}, status.ParamInvalid, status.StageCheck},
		{"destination tensor 8589934589 is outside the local cache of 4 tensors", row, row,
			Request{SrcTensors: all, DstTensors: Range{First: math.MaxUint32, Count: math.MaxUint32}, Size: -1},
			status.ParamInvalid, status.StageCheck},
		{"a range of no destination tensors, from 1", row, row,
			Request{SrcTensors: all, DstTensors: Range{First: 1}, Size: -1}, status.ParamInvalid, status.StageCheck},
		{"2 source tensors for 4 destination tensors", row, row,
			Request{SrcTensors: Range{Count: 2}, DstTensors: all, Size: -1}, status.ParamInvalid, status.StageCheck},
		{"4 tensors of the remote cache for 2 of the local cache", row, row,
			Request{SrcTensors: all, DstTensors: Range{Count: 2}, Size: -1}, status.ParamInvalid, status.StageLookup},
		{"source tensor 5 is outside the remote cache of 4 tensors", row, row,
			Request{SrcTensors: Range{First: 2, Count: 4}, DstTensors: all, Size: -1}, status.ParamInvalid, status.StageLookup},
		{"source batch 2 is outside the remote cache of 2 batches", row, row,
			Request{SrcBatch: 2, Size: -1}, status.CacheNotExist, status.StageLookup},
		{"source batch 1 is outside the remote cache of 1 batches", blocks, blocks,
			Request{SrcBatch: 1, SrcBlocks: []uint64{0}, DstBlocks: []uint64{0}}, status.CacheNotExist, status.StageLookup},
		{"source batch 1 is outside the remote cache of 1 batches", blocks, shape(Contiguous, 4, 1, 4),
			Request{SrcBatch: 1, Size: -1, OneSided: true}, status.CacheNotExist, status.StageLookup},
		{"source block 9 is outside the remote cache of 8 blocks", blocks, blocks,
			Request{SrcBlocks: []uint64{9}, DstBlocks: []uint64{0}}, status.ParamInvalid, status.StageLookup},
		{"source block 18446744073709551615 is outside the remote cache of 8 blocks", blocks, blocks,
			Request{SrcBlocks: []uint64{max}, DstBlocks: []uint64{0}}, status.ParamInvalid, status.StageLookup},
		{"source block 4 is outside the remote tensor of 32 bytes, in local blocks of 8 bytes", blocks, shape(Blocks, 4, 8, 8),
			Request{SrcBlocks: []uint64{4}, DstBlocks: []uint64{0}}, status.ParamInvalid, status.StageLookup},
		{"source block 8 is outside the remote tensor of 32 bytes, in local blocks of 4 bytes", row, blocks,
			Request{SrcBlocks: []uint64{8}, DstBlocks: []uint64{0}, OneSided: true}, status.ParamInvalid, status.StageLookup},
		{"1 source blocks, but the remote cache is not one of blocks", row, blocks,
			Request{SrcBlocks: []uint64{0}, DstBlocks: []uint64{0}}, status.ParamInvalid, status.StageLookup},
		{"a pull without source blocks from a remote cache of blocks", blocks, blocks,
			Request{DstBlocks: []uint64{0}}, status.ParamInvalid, status.StageLookup},
		{"5 destination blocks of 4 bytes are more than the remote row of 16 bytes fills", row, blocks,
			Request{DstBlocks: []uint64{0, 1, 2, 3, 4}}, status.ParamInvalid, status.StageLookup},
		{"the remote cache is of unknown kind 3", Shape{Kind: 3}, row, Request{Size: -1}, status.ParamInvalid, status.StageLookup},
		{"the remote cache cannot be: 1 tensors of 4 bytes, 4611686018427387905 times 4 bytes each",
			Shape{Kind: Contiguous, Tensors: 1, TensorBytes: 4, Stride: 4, Count: max/4 + 2}, row,
			Request{Size: -1}, status.ParamInvalid, status.StageLookup},
		{"the local cache cannot be: 1 tensors of 0 bytes, 1 times 0 bytes each", row,
			Shape{Kind: Contiguous, Tensors: 1, Count: 1}, Request{Size: -1}, status.ParamInvalid, status.StageCheck},
		{"1 pieces in each of 4294967295 tensors are more than the 16777216 that one request may have",
			shape(Contiguous, math.MaxUint32, 1, 4), shape(Contiguous, math.MaxUint32, 1, 4),
			Request{Size: -1}, status.ParamInvalid, status.StageCheck},
	} {
		t.Run(c.cause, func(t *testing.T) {
			if c.req.SrcTensors == (Range{}) && c.req.DstTensors == (Range{}) {
				c.req.SrcTensors, c.req.DstTensors = all, all
			}
			used := make([]Segment, 3)
			got, err := Build(&c.req, c.src, c.dst, used)
			requireError(t, err, c.code, c.stage, c.cause)
			require.Empty(t, got)
			require.Equal(t, 3, cap(got), "the caller's buffer comes back with an error too")
		})
	}
}

func TestOneSidedIgnoresTheRemoteKind(t *testing.T) { // spec §8.6
	row, blocks := shape(Contiguous, 1, 2, 16), shape(Blocks, 1, 8, 4)
	for _, c := range []struct {
		name     string
		src, dst Shape
		req      Request
		want     Segment
	}{
		{"a row from the base of a cache of blocks", blocks, shape(Contiguous, 1, 4, 4),
			Request{DstBatch: 2, Size: 3}, Segment{SrcOffset: 0, DstOffset: 8, Bytes: 3}},
		{"one block as a row, into a block", blocks, blocks,
			Request{DstBlocks: []uint64{5}}, Segment{SrcOffset: 0, DstOffset: 20, Bytes: 4}},
		{"rows as an array of local blocks", row, blocks,
			Request{SrcBlocks: []uint64{6, 7}, DstBlocks: []uint64{0, 1}}, Segment{SrcOffset: 24, DstOffset: 0, Bytes: 8}},
		{"smaller local blocks, beyond the remote block count", shape(Blocks, 1, 2, 16), blocks,
			Request{SrcBlocks: []uint64{7}, DstBlocks: []uint64{0}}, Segment{SrcOffset: 28, DstOffset: 0, Bytes: 4}},
		{"the batch index counts in remote rows", row, blocks,
			Request{SrcBatch: 1, DstBlocks: []uint64{2}}, Segment{SrcOffset: 16, DstOffset: 8, Bytes: 4}},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.req.SrcTensors, c.req.DstTensors, c.req.OneSided = all, all, true
			got, err := Build(&c.req, c.src, c.dst, nil)
			require.NoError(t, err)
			require.Equal(t, []Segment{c.want}, got)
			verify(t, &c.req, c.src, c.dst)
		})
	}
}

func TestRowShorterThanABlock(t *testing.T) {
	req := Request{SrcTensors: all, DstTensors: all, SrcBatch: 1, DstBlocks: []uint64{3}}
	got, err := Build(&req, shape(Contiguous, 1, 2, 3), shape(Blocks, 1, 4, 4), nil)
	require.NoError(t, err)
	require.Equal(t, []Segment{{SrcOffset: 3, DstOffset: 12, Bytes: 3}}, got)
}

// Two caches with the tensors of three parts: 4 in each part at the source, 2 at the destination.
func TestARangeOfPartsIsOfEachPart(t *testing.T) {
	src, dst := shape(Contiguous, 12, 1, 4), shape(Contiguous, 6, 1, 4)
	of := func(first, count uint32) Range { return Range{First: first, Count: count, Parts: 3} }
	for _, c := range []struct {
		name     string
		src, dst Range
		pairs    [][2]uint32 // nil: refused
	}{
		{"one tensor of each", of(2, 1), of(1, 1), [][2]uint32{{2, 1}, {6, 3}, {10, 5}}},
		{"two of each", of(1, 2), of(0, 2), [][2]uint32{{1, 0}, {2, 1}, {5, 2}, {6, 3}, {9, 4}, {10, 5}}},
		{"into all", of(2, 2), all, [][2]uint32{{2, 0}, {3, 1}, {6, 2}, {7, 3}, {10, 4}, {11, 5}}},
		{"beyond a part of the source", of(3, 2), of(0, 2), nil},
		{"beyond a part of the destination", of(0, 2), of(1, 2), nil},
		{"from all", all, of(0, 2), nil},
		{"other parts", Range{Count: 2, Parts: 3}, Range{Count: 3, Parts: 2}, nil},
		{"parts that are not equal", Range{Count: 1, Parts: 4}, Range{Count: 1, Parts: 4}, nil},
		{"more parts than tensors", Range{Count: 1, Parts: 1 << 31}, Range{Count: 1, Parts: 1 << 31}, nil},
		{"more than can be counted", Range{Count: math.MaxUint32, Parts: math.MaxUint32}, all, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := Build(&Request{SrcTensors: c.src, DstTensors: c.dst, Size: -1}, src, dst, nil)
			if c.pairs == nil {
				require.Equal(t, status.ParamInvalid, status.CodeOf(err), "%v", err)
				return
			}
			require.NoError(t, err)
			for i, pair := range c.pairs {
				require.Equal(t, Segment{SrcTensor: pair[0], DstTensor: pair[1], Bytes: 4}, got[i])
			}
			require.Len(t, got, len(c.pairs))
		})
	}
}

func TestTotalSaturates(t *testing.T) {
	require.Equal(t, uint64(0), Total(nil))
	require.Equal(t, uint64(7), Total([]Segment{{Bytes: 3}, {Bytes: 4}}))
	require.Equal(t, uint64(math.MaxUint64), Total([]Segment{{Bytes: math.MaxUint64}, {Bytes: 1}}))
}

// TestHashIsTheDocumentedFormula pins the value: two releases that differ in it cannot pull from each other.
func TestHashIsTheDocumentedFormula(t *testing.T) {
	req := Request{SrcTensors: all, DstTensors: all, SrcBlocks: []uint64{5, 6, 1}, DstBlocks: []uint64{0, 1, 3}}
	segments, err := Build(&req, shape(Blocks, 1, 8, 4), shape(Blocks, 1, 4, 4), nil)
	require.NoError(t, err)
	require.Equal(t, uint64(0x168be73c77c3d2ea), Hash(&req, segments))
}

// verify holds Build against the oracle: the verdict always, the bytes where the shapes are small.
func verify(t *testing.T, req *Request, src, dst Shape) {
	t.Helper()
	want := oracleVerdict(req, src, dst)
	local, remote := CheckLocal(req, dst), CheckRemote(req, src, dst) // each must stand any input alone
	require.Equal(t, want == status.Success, local == nil && remote == nil, "%v, %v", local, remote)
	if want == status.Success && req.DstTensors.Tensors(dst) > 1<<12 {
		return // a good request, but a list too long to look at here
	}
	got, err := Build(req, src, dst, nil)
	require.Equal(t, want, status.CodeOf(err), "%v", err)
	if err != nil {
		return
	}
	verifySegments(t, got, src, dst)
	verifyHash(t, req, got)
	if dst.TensorBytes > (1<<12)/uint64(dst.Tensors) {
		return
	}
	for tensor, have := range moved(got, dst) {
		for p := range have {
			if expect := oracleByte(req, src, dst, uint32(tensor), uint64(p)); have[p] != expect {
				require.Equal(t, expect, have[p], "tensor %d byte %d", tensor, p)
			}
		}
	}
}

// verifySegments: none is empty or out of bounds, tensor pairs come in order, no neighbours are left unmerged.
func verifySegments(t *testing.T, segments []Segment, src, dst Shape) {
	t.Helper()
	require.NotEmpty(t, segments)
	for i, s := range segments {
		ok := s.Bytes > 0 && s.SrcTensor < src.Tensors && s.DstTensor < dst.Tensors &&
			s.Bytes <= src.TensorBytes && s.SrcOffset <= src.TensorBytes-s.Bytes &&
			s.Bytes <= dst.TensorBytes && s.DstOffset <= dst.TensorBytes-s.Bytes
		if i > 0 {
			before := segments[i-1]
			step := s.SrcTensor - before.SrcTensor
			ok = ok && step <= 1 && s.DstTensor-before.DstTensor == step
			ok = ok && (step == 1 || s.SrcOffset != before.SrcOffset+before.Bytes || s.DstOffset != before.DstOffset+before.Bytes)
		}
		require.True(t, ok, "segment %d: %+v", i, s)
	}
}

// verifyHash: the same plan has the same hash, one that differs in lengths, order, block ids or number has another.
func verifyHash(t *testing.T, req *Request, segments []Segment) {
	t.Helper()
	hash := Hash(req, segments)
	require.Equal(t, hash, Hash(req, segments))
	for i := range segments {
		if i > 3 {
			break
		}
		segments[i].Bytes++
		require.NotEqual(t, hash, Hash(req, segments), "one byte more in segment %d", i)
		segments[i].Bytes--
		if j := len(segments) - 1 - i; segments[i] != segments[j] {
			segments[i], segments[j] = segments[j], segments[i]
			require.NotEqual(t, hash, Hash(req, segments), "segments %d and %d exchanged", i, j)
			segments[i], segments[j] = segments[j], segments[i]
		}
	}
	require.NotEqual(t, hash, Hash(req, segments[1:]))
	for _, ids := range [][]uint64{req.SrcBlocks, req.DstBlocks} {
		if len(ids) > 0 {
			ids[0]++
			require.NotEqual(t, hash, Hash(req, segments))
			ids[0]--
		}
	}
	require.Equal(t, hash, Hash(req, segments))
}

func TestBuildAgreesWithTheSpecificationByteByByte(t *testing.T) {
	rounds := 30_000
	if testing.Short() {
		rounds = 3_000
	}
	random := rand.New(rand.NewPCG(1, 2))
	served := 0
	for range rounds {
		req, src, dst := sensible(random)
		verify(t, &req, src, dst)
		if CheckLocal(&req, dst) == nil && CheckRemote(&req, src, dst) == nil {
			served++
		}
	}
	require.Greater(t, served, rounds/4, "the requests drawn are mostly refused, so they show little")
}

func TestBuildStandsAnything(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	var raw [192]byte
	for range 20_000 {
		for i := 0; i < len(raw); i += 8 {
			binary.LittleEndian.PutUint64(raw[i:], random.Uint64())
		}
		req, src, dst := decode(raw[:])
		verify(t, &req, src, dst)
	}
}

// sensible draws a request of which a good part can be served.
func sensible(random *rand.Rand) (Request, Shape, Shape) {
	upTo := func(n int) uint64 { return uint64(random.IntN(n + 1)) }
	rarely := func() uint64 { return upTo(40) / 40 }
	from := shape([]Kind{Contiguous, Blocks}[upTo(1)], uint32(1+upTo(4)), 1+upTo(6), 1+upTo(8))
	to := shape([]Kind{Contiguous, Blocks}[upTo(1)], uint32(1+upTo(4)), 1+upTo(6), 1+upTo(8))
	if upTo(2) > 0 {
		to.Tensors = from.Tensors
	}
	if upTo(2) > 0 {
		to = shape(to.Kind, to.Tensors, to.Count, from.Stride)
	}
	from.TensorBytes += rarely() * upTo(int(from.Count)-1) // bytes left over
	req := Request{SrcTensors: all, DstTensors: all, SrcBatch: rarely(), DstBatch: rarely(), Size: -1, OneSided: upTo(1) == 1}
	count := 1 + uint32(upTo(int(min(from.Tensors, to.Tensors))-1))
	if count == from.Tensors && upTo(1) == 0 {
		req.DstTensors = Range{First: to.Tensors - count + uint32(rarely()), Count: count}
	} else if count == to.Tensors && upTo(1) == 0 {
		req.SrcTensors = Range{First: from.Tensors - count + uint32(rarely()), Count: count}
	} else if upTo(2) == 0 {
		req.SrcTensors = Range{First: from.Tensors - count, Count: count}
		req.DstTensors = Range{First: uint32(upTo(int(to.Tensors - count))), Count: count}
	}
	if from.Kind == Contiguous {
		req.SrcBatch = upTo(int(from.Count)-1) + rarely()
	}
	if to.Kind == Contiguous {
		req.DstBatch = upTo(int(to.Count)-1) + rarely()
		if upTo(1) == 0 {
			req.Size = int64(1 + upTo(int(to.Stride)-1) + rarely())
		}
		switch upTo(3) {
		case 0:
			req.Whole = true
		case 1:
			req.Exact, req.DstOffset, req.SrcOffset = true, upTo(int(to.Stride)-1)+rarely(), upTo(int(from.Stride)-1)
			if req.Size > 0 {
				req.Size = 1 + max(0, req.Size-1-int64(max(req.DstOffset, req.SrcOffset)))
			}
		}
		return req, from, to
	}
	for next := upTo(int(to.Count) - 1); len(req.DstBlocks) < int(1+upTo(4)); next++ {
		if upTo(2) == 0 {
			next = upTo(int(to.Count) - 1)
		}
		req.DstBlocks = append(req.DstBlocks, next%to.Count+rarely()*rarely())
	}
	if from.Kind == Blocks || req.OneSided && upTo(1) == 0 {
		req.SrcBatch *= rarely()
		next := upTo(int(from.Count) - 1)
		for range req.DstBlocks {
			if upTo(2) == 0 {
				next = upTo(int(from.Count) - 1)
			}
			req.SrcBlocks = append(req.SrcBlocks, next%from.Count+rarely()*rarely())
			next++
		}
	}
	return req, from, to
}

// reader takes numbers from arbitrary bytes: mostly small ones, some that sit at the edges of 64 bits, some of any size.
type reader []byte

func (r *reader) byte() byte {
	if len(*r) == 0 {
		return 0
	}
	b := (*r)[0]
	*r = (*r)[1:]
	return b
}

func (r *reader) number() uint64 {
	switch b := r.byte(); {
	case b < 224:
		return uint64(b % 16)
	case b < 240:
		return (uint64(1)<<(4*(b%16)) - 1) + uint64(r.byte()%3)
	case b < 248:
		return math.MaxUint64 - uint64(b%4)
	default:
		var v uint64
		for range 8 {
			v = v<<8 | uint64(r.byte())
		}
		return v
	}
}

func (r *reader) shape(flags byte) Shape {
	s := Shape{Kind: Contiguous + Kind(flags>>1&1), Tensors: uint32(r.number()), Stride: r.number(), Count: r.number()}
	s.TensorBytes = s.Stride * s.Count
	if flags&1 != 0 {
		s.TensorBytes = r.number()
		s.Kind = Kind(r.byte() % 4)
		if s.Count > 0 && s.Kind%2 == 0 {
			s.Stride = s.TensorBytes / s.Count
		}
	}
	return s
}

func (r *reader) tensors() Range {
	if r.byte()%2 == 0 {
		return all
	}
	return Range{First: uint32(r.number()), Count: uint32(r.number())}
}

func (r *reader) blocks(n int) []uint64 {
	ids := make([]uint64, 0, n)
	for len(ids) < n {
		ids = append(ids, r.number())
	}
	return ids
}

func decode(raw []byte) (req Request, src, dst Shape) {
	r := reader(raw)
	flags, counts := r.byte(), r.byte()
	req.OneSided = flags&1 != 0
	src, dst = r.shape(flags>>2), r.shape(flags>>4)
	if flags&0xC0 == 0 { // the same shape on both sides
		src = Shape{Kind: src.Kind, Tensors: dst.Tensors, TensorBytes: dst.TensorBytes, Stride: dst.Stride, Count: dst.Count}
	}
	req.SrcTensors, req.DstTensors = r.tensors(), r.tensors()
	req.SrcBatch, req.DstBatch, req.Size = r.number(), r.number(), int64(r.number())-1
	req.DstBlocks = r.blocks(int(counts % 8))
	switch {
	case counts&0x80 != 0:
		req.SrcBlocks = r.blocks(len(req.DstBlocks))
	case counts&0x40 != 0:
		req.SrcBlocks = r.blocks(int(counts >> 3 & 7))
	}
	switch r.byte() % 4 {
	case 1:
		req.Whole = true
	case 2:
		req.SrcOffset, req.DstOffset, req.Exact = r.number(), r.number(), true
	}
	return req, src, dst
}

func FuzzBuild(f *testing.F) {
	for _, seed := range [][]byte{
		{0x00, 0x00, 2, 4, 2, 2, 4, 2, 0, 0, 1, 0, 4},                                         // row to row
		{0x60, 0x02, 1, 8, 2, 1, 4, 4, 0, 0, 1, 0, 0, 3, 0},                                   // row to blocks
		{0x68, 0x83, 1, 4, 8, 1, 4, 4, 0, 0, 0, 0, 0, 0, 1, 3, 5, 6, 1},                       // blocks to blocks
		{0x61, 0x83, 3, 15, 2, 3, 4, 8, 1, 1, 2, 1, 1, 2, 0, 0, 0, 0, 1, 3, 5, 6, 1},          // one-sided, blocks of a row
		{0x00, 0x00, 1, 248, 0, 0, 1, 0, 0, 0, 0, 0, 2, 1, 248, 0, 0, 1, 0, 0, 0, 0, 0, 2, 0}, // terabytes
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		req, src, dst := decode(raw)
		verify(t, &req, src, dst)
	})
}

// paged is W1: 64 tensors of 512 blocks of 32 KiB, 64 random blocks of each.
func paged() (*Request, Shape, Shape) {
	random := rand.New(rand.NewPCG(5, 6))
	req := &Request{SrcTensors: all, DstTensors: all}
	for i := range 64 {
		req.SrcBlocks = append(req.SrcBlocks, uint64(random.Perm(512)[i]))
		req.DstBlocks = append(req.DstBlocks, uint64(random.Perm(512)[i]))
	}
	cache := shape(Blocks, 64, 512, 32<<10)
	return req, cache, cache
}

func TestBuildIntoAReusedListAllocatesNothing(t *testing.T) {
	req, src, dst := paged()
	list, err := Build(req, src, dst, nil)
	require.NoError(t, err)
	require.Len(t, list, 4096)
	require.Equal(t, uint64(128<<20), Total(list))
	require.Zero(t, testing.AllocsPerRun(10, func() {
		again, err := Build(req, src, dst, list)
		if err != nil || len(again) != 4096 || &again[0] != &list[0] {
			t.Error("another list", err)
		}
	}))
}

func BenchmarkBuildPaged(b *testing.B) {
	req, src, dst := paged()
	list, _ := Build(req, src, dst, nil)
	b.ReportAllocs()
	for b.Loop() {
		list, _ = Build(req, src, dst, list)
	}
}

func BenchmarkHashPaged(b *testing.B) {
	req, src, dst := paged()
	list, _ := Build(req, src, dst, nil)
	b.ReportAllocs()
	for b.Loop() {
		Hash(req, list)
	}
}
