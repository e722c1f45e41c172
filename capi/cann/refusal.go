// SPDX-License-Identifier: Apache-2.0

package cann

// #include "shim.h"
import "C"

import (
	"sync"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// refusals are what calls write the reason of a failure into: each is a kilobyte, and most calls succeed.
var refusals = sync.Pool{New: func() any { return new(C.cann_error) }}

// call makes one call of the face, and returns its failure as an error of a stage.
func call(stage status.Stage, run func(refusal *C.cann_error) C.int32_t) error {
	refusal := refusals.Get().(*C.cann_error)
	defer refusals.Put(refusal)
	return refused(stage, run(refusal), refusal)
}

// refused is the one place where who has refused a call, and the number that it gave, become an error. nil: nobody has.
func refused(stage status.Stage, who C.int32_t, refusal *C.cann_error) error {
	if who == C.CANN_SUCCESS {
		return nil
	}
	return status.New(codeOf(who, int64(refusal.code)), stage, C.GoString(&refusal.text[0]))
}

// codeOf keeps what the API documents: statuses of the library, and the two of the device runtime that are among them. The text has the
// numbers of the others.
func codeOf(who C.int32_t, number int64) status.Code {
	switch who {
	case C.CANN_LIBRARY, C.CANN_RUNTIME:
		if code := status.Code(number); int64(code) == number && code != status.Success && code.Documented() {
			return code
		}
	case C.CANN_FACE:
		switch number {
		case C.CANN_NOT_LOADED, C.CANN_CANNOT_LOAD, C.CANN_MISSING_SYMBOL, C.CANN_WRONG_ABI:
			return status.FeatureNotEnabled
		}
	}
	return status.Failed
}

// reworded is err, which [call] has returned, with another code and with a cause that says what was being done.
func reworded(err error, code status.Code, what string) error {
	inner := status.From(err, "")
	return &status.Error{Code: code, Stage: inner.Stage, Cause: what + ": " + inner.Cause, Err: inner}
}

// text is how a text crosses to C: its bytes and a zero.
func text(s string) *C.uint8_t {
	return (*C.uint8_t)(&append([]byte(s), 0)[0])
}
