// SPDX-License-Identifier: Apache-2.0

// Package status owns the status codes of the API and the one error type that carries them.
//
// Every failure that leaves a package of core is an [*Error]: a code (the documented status), and what a person needs to act on
// it: operation, peer, address, stage, cause, hint. The package never decides what a failure means; it only carries it.
package status

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
)

// Code is a documented status value. The zero value is success.
type Code uint32

// The codes that the engine produces. Values are those of the Python enum LLMStatusCode.
const (
	Success           Code = 0
	Failed            Code = 0xFFFFFFFF
	WaitTimeout       Code = 0x5010B001
	CacheNotExist     Code = 0x5010B002
	RepeatRequest     Code = 0x5010B003
	ParamInvalid      Code = 0x5010B005
	EngineFinalized   Code = 0x5010B006
	NotYetLink        Code = 0x5010B007
	AlreadyLink       Code = 0x5010B008
	LinkFailed        Code = 0x5010B009
	UnlinkFailed      Code = 0x5010B00A
	ExistLink         Code = 0x5010B018
	FeatureNotEnabled Code = 0x5010B019
	Timeout           Code = 0x5010B01A
	LinkBusy          Code = 0x5010B01B
	OutOfMemory       Code = 0x5010B01C
)

// The codes that only a vendor's library produces, and its device runtime the last two.
const (
	RequestAlreadyCompleted  Code = 0x5010B004
	NotifyPromptUnlinkFailed Code = 0x5010B00B
	ClusterNumExceedLimit    Code = 0x5010B00C
	ProcessingLink           Code = 0x5010B00D
	DeviceOutOfMemory        Code = 0x5010B00E
	PrefixAlreadyExist       Code = 0x5010B00F
	PrefixNotExist           Code = 0x5010B010
	SeqLenOverLimit          Code = 0x5010B011
	NoFreeBlock              Code = 0x5010B012
	BlocksOutOfMemory        Code = 0x5010B013
	DeviceMemError           Code = 507053
	SuspectRemoteError       Code = 507057
)

var names = map[Code]string{
	Success: "LLM_SUCCESS", Failed: "LLM_FAILED", WaitTimeout: "LLM_WAIT_PROCESS_TIMEOUT", CacheNotExist: "LLM_KV_CACHE_NOT_EXIST",
	RepeatRequest: "LLM_REPEAT_REQUEST", ParamInvalid: "LLM_PARAM_INVALID", EngineFinalized: "LLM_ENGINE_FINALIZED",
	NotYetLink: "LLM_NOT_YET_LINK", AlreadyLink: "LLM_ALREADY_LINK", LinkFailed: "LLM_LINK_FAILED", UnlinkFailed: "LLM_UNLINK_FAILED",
	ExistLink: "LLM_EXIST_LINK", FeatureNotEnabled: "LLM_FEATURE_NOT_ENABLED", Timeout: "LLM_TIMEOUT", LinkBusy: "LLM_LINK_BUSY",
	OutOfMemory: "LLM_OUT_OF_MEMORY",

	RequestAlreadyCompleted: "LLM_REQUEST_ALREADY_COMPLETED", NotifyPromptUnlinkFailed: "LLM_NOTIFY_PROMPT_UNLINK_FAILED",
	ClusterNumExceedLimit: "LLM_CLUSTER_NUM_EXCEED_LIMIT", ProcessingLink: "LLM_PROCESSING_LINK",
	DeviceOutOfMemory: "LLM_DEVICE_OUT_OF_MEMORY", PrefixAlreadyExist: "LLM_PREFIX_ALREADY_EXIST",
	PrefixNotExist: "LLM_PREFIX_NOT_EXIST", SeqLenOverLimit: "LLM_SEQ_LENOVERLIMIT", NoFreeBlock: "LLM_NO_FREE_BLOCK",
	BlocksOutOfMemory: "LLM_BLOCKS_OUT_OF_MEMORY", DeviceMemError: "LLM_DEVICE_MEM_ERROR",
	SuspectRemoteError: "LLM_SUSPECT_REMOTE_ERROR",
}

// String returns the documented name, or the number in hexadecimal for a code that has none here.
func (c Code) String() string {
	if name, ok := names[c]; ok {
		return name
	}
	return fmt.Sprintf("status 0x%X", uint32(c))
}

// Documented says that the code has a name in the API; a number without one must not reach callers as a code.
func (c Code) Documented() bool {
	_, ok := names[c]
	return ok
}

// Stage says how far a call had come when it failed.
type Stage string

// The stages, in the order in which a call passes them.
const (
	StageCheck     Stage = "check"
	StageResolve   Stage = "resolve"
	StageDial      Stage = "dial"
	StageHandshake Stage = "handshake"
	StageRegister  Stage = "register"
	StageLookup    Stage = "lookup"
	StageTransfer  Stage = "transfer"
	StageVerify    Stage = "verify"
	StageClose     Stage = "close"
)

// Error is the one error type of the engine.
type Error struct {
	Code      Code
	Operation string // the documented call, such as "pull_blocks"; "" until the engine names it
	Peer      uint64 // cluster id of the peer; meaningful where HasPeer
	HasPeer   bool
	Address   string // "ip:port" of the peer, or ""
	Stage     Stage
	Cause     string // what went wrong, as a phrase: "receiver has not confirmed"
	Hint      string // what to do about it, or ""
	Err       error  // the failure behind this one, or nil
}

// New makes an error from a code, a stage and a cause.
func New(code Code, stage Stage, cause string) *Error {
	return &Error{Code: code, Stage: stage, Cause: cause}
}

// Newf is New with a formatted cause. Where an argument is wrapped with %w it is kept as the failure behind this one.
func Newf(code Code, stage Stage, format string, args ...any) *Error {
	wrapped := fmt.Errorf(format, args...)
	return &Error{Code: code, Stage: stage, Cause: wrapped.Error(), Err: errors.Unwrap(wrapped)}
}

// Error shows the code and every field that is set.
func (e *Error) Error() string {
	var b strings.Builder
	if e.Operation != "" {
		b.WriteString(e.Operation)
		b.WriteString(" failed, ")
	}
	fmt.Fprintf(&b, "error code is LLMStatusCode.%s", e.Code)
	if e.HasPeer {
		fmt.Fprintf(&b, ", peer %d", e.Peer)
	}
	if e.Address != "" {
		fmt.Fprintf(&b, " at %s", e.Address)
	}
	if e.Stage != "" {
		fmt.Fprintf(&b, ", stage %s", e.Stage)
	}
	if e.Cause != "" {
		fmt.Fprintf(&b, ", cause: %s", e.Cause)
	}
	if e.Hint != "" {
		fmt.Fprintf(&b, ", hint: %s", e.Hint)
	}
	return b.String()
}

// Unwrap returns the failure behind this one, or nil.
func (e *Error) Unwrap() error { return e.Err }

// Is makes errors.Is(err, status.Code) work: a Code matches the errors that carry it.
func (e *Error) Is(target error) bool {
	code, ok := target.(Code)
	return ok && code == e.Code
}

// Error lets a Code stand as the target of errors.Is.
func (c Code) Error() string { return c.String() }

// At returns a copy that names the peer and its address.
func (e *Error) At(peer uint64, address string) *Error {
	out := *e
	out.Peer, out.HasPeer, out.Address = peer, true, address
	return &out
}

// During returns a copy that names the documented call.
func (e *Error) During(operation string) *Error {
	out := *e
	out.Operation = operation
	return &out
}

// Hinting returns a copy that says what to do.
func (e *Error) Hinting(hint string) *Error {
	out := *e
	out.Hint = hint
	return &out
}

// From returns err as an *Error. A deadline becomes Timeout, anything unknown Failed; the original is kept behind it.
func From(err error, stage Stage) *Error {
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	code := Failed
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
		code = Timeout
	}
	return &Error{Code: code, Stage: stage, Cause: err.Error(), Err: err}
}

// CodeOf returns the code that err carries; Success for nil.
func CodeOf(err error) Code {
	if err == nil {
		return Success
	}
	return From(err, "").Code
}

// MarshalJSON writes the form that crosses the boundary to Python: absent fields are null.
func (e *Error) MarshalJSON() ([]byte, error) {
	var peer *uint64
	if e.HasPeer {
		peer = &e.Peer
	}
	text := func(s string) *string {
		if s == "" {
			return nil
		}
		return &s
	}
	return json.Marshal(struct {
		Code      uint32  `json:"code"`
		Operation *string `json:"operation"`
		Peer      *uint64 `json:"peer"`
		Address   *string `json:"address"`
		Stage     *string `json:"stage"`
		Cause     *string `json:"cause"`
		Hint      *string `json:"hint"`
		Text      string  `json:"text"`
	}{uint32(e.Code), text(e.Operation), peer, text(e.Address), text(string(e.Stage)), text(e.Cause), text(e.Hint), e.Error()})
}
