// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"math/big"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// The oracle says what a call must do, in the words of the specification and without any of the package's own steps: a verdict in
// unbounded integers, and the contents of every destination byte, looked up one at a time.

func num(v uint64) *big.Int { return new(big.Int).SetUint64(v) }

func below(a, b *big.Int) bool { return a.Cmp(b) < 0 }

// oracleVerdict is the documented status of the request (spec §8.5.2, §8.5.3, §8.6 with §14 rows 1, 4 and 9).
func oracleVerdict(req *Request, src, dst Shape) status.Code {
	for _, s := range []Shape{src, dst} {
		exact := s.Count > 0 && s.Stride > 0 && s.Tensors > 0 && new(big.Int).Div(num(s.TensorBytes), num(s.Count)).Cmp(num(s.Stride)) == 0
		if !exact || s.Kind != Contiguous && s.Kind != Blocks {
			return status.ParamInvalid
		}
	}
	if code := oracleLocal(req, dst); code != status.Success {
		return code
	}
	batches := src.Count
	if src.Kind == Blocks || len(req.SrcBlocks) > 0 {
		batches = 1
	}
	if req.SrcBatch >= batches {
		return status.CacheNotExist
	}
	if !req.OneSided && (src.Kind == Blocks) != (len(req.SrcBlocks) > 0) {
		return status.ParamInvalid
	}
	sources, destinations := oracleTensors(req.SrcTensors, src), oracleTensors(req.DstTensors, dst)
	if sources == nil || destinations == nil || sources[1].Cmp(destinations[1]) != 0 {
		return status.ParamInvalid
	}
	block, row := num(dst.Stride), num(src.Stride)
	for i := range req.DstBlocks {
		if len(req.SrcBlocks) > 0 {
			id := num(req.SrcBlocks[i])
			end := new(big.Int).Add(new(big.Int).Mul(id, block), block)
			if below(num(src.TensorBytes), end) || !req.OneSided && !below(id, num(src.Count)) {
				return status.ParamInvalid
			}
		} else if start := new(big.Int).Mul(num(uint64(i)), block); !below(start, row) {
			return status.ParamInvalid
		}
	}
	if len(req.DstBlocks) > 0 {
		return status.Success
	}
	if req.Whole && below(num(dst.Stride), row) {
		return status.ParamInvalid
	}
	if !req.Whole && below(row, new(big.Int).Add(num(req.SrcOffset), oraclePull(req, dst))) {
		return status.ParamInvalid
	}
	return status.Success
}

func oracleLocal(req *Request, dst Shape) status.Code {
	batches := dst.Count
	if dst.Kind == Blocks {
		batches = 1
	}
	wrong := req.DstBatch >= batches || (dst.Kind == Blocks) != (len(req.DstBlocks) > 0)
	if len(req.DstBlocks) == 0 {
		wrong = wrong || len(req.SrcBlocks) > 0 || req.Size == 0 || req.Size < -1 || req.DstOffset >= dst.Stride
		wrong = wrong || below(num(dst.Stride), new(big.Int).Add(num(req.DstOffset), oraclePull(req, dst)))
	}
	if len(req.SrcBlocks) > 0 && len(req.SrcBlocks) != len(req.DstBlocks) {
		wrong = true
	}
	for _, id := range req.DstBlocks {
		wrong = wrong || id >= dst.Count
	}
	destinations := oracleTensors(req.DstTensors, dst)
	if destinations == nil || !req.SrcTensors.All && num(uint64(req.SrcTensors.Count)).Cmp(destinations[1]) != 0 {
		wrong = true
	}
	if wrong {
		return status.ParamInvalid
	}
	return status.Success
}

// oraclePull is P of §8.5.4, with the length of §9.5 where there is an offset.
func oraclePull(req *Request, dst Shape) *big.Int {
	if req.Size > 0 {
		return big.NewInt(req.Size)
	}
	return new(big.Int).Sub(num(dst.Stride), num(req.DstOffset))
}

// oracleTensors is the first tensor and the number of tensors, or nil where the range is not inside the cache.
func oracleTensors(r Range, of Shape) []*big.Int {
	if r.All {
		return []*big.Int{num(0), num(uint64(of.Tensors))}
	}
	first, count := num(uint64(r.First)), num(uint64(r.Count))
	if r.Count == 0 || below(num(uint64(of.Tensors)), new(big.Int).Add(first, count)) {
		return nil
	}
	return []*big.Int{first, count}
}

// origin names a byte of the source; the zero value stands for a byte of the destination that keeps its value.
type origin struct {
	moved  bool
	tensor uint32
	offset uint64
}

// oracleByte says where byte p of destination tensor t comes from after a successful call (§8.5.4). Small shapes only.
func oracleByte(req *Request, src, dst Shape, t uint32, p uint64) origin {
	from, to := oracleTensors(req.SrcTensors, src), oracleTensors(req.DstTensors, dst)
	k := int64(t) - to[0].Int64()
	if k < 0 || k >= to[1].Int64() {
		return origin{}
	}
	tensor := uint32(from[0].Int64() + k)
	if len(req.DstBlocks) == 0 {
		start, bytes, from := req.DstBatch*dst.Stride, src.Stride, req.SrcBatch*src.Stride
		if !req.Whole {
			start, bytes, from = start+req.DstOffset, oraclePull(req, dst).Uint64(), from+req.SrcOffset
		}
		if p < start || p >= start+bytes {
			return origin{}
		}
		return origin{true, tensor, from + p - start}
	}
	for j := len(req.DstBlocks) - 1; j >= 0; j-- { // where a block is listed twice the later piece stays
		if p/dst.Stride != req.DstBlocks[j] || p/dst.Stride >= dst.Count {
			continue
		}
		inBlock := p % dst.Stride
		if len(req.SrcBlocks) > 0 {
			return origin{true, tensor, req.SrcBlocks[j]*dst.Stride + inBlock}
		}
		if inRow := uint64(j)*dst.Stride + inBlock; inRow < src.Stride {
			return origin{true, tensor, req.SrcBatch*src.Stride + inRow}
		}
	}
	return origin{}
}

// moved carries the segments out, in order, and keeps for each destination byte where it came from.
func moved(segments []Segment, dst Shape) [][]origin {
	out := make([][]origin, dst.Tensors)
	for t := range out {
		out[t] = make([]origin, dst.TensorBytes)
	}
	for _, s := range segments {
		for i := range s.Bytes {
			out[s.DstTensor][s.DstOffset+i] = origin{true, s.SrcTensor, s.SrcOffset + i}
		}
	}
	return out
}
