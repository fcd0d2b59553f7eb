package engine

import (
	"context"
	"log/slog"

	"tenon.dev/tenon/internal/network"
)

// Config is what an engine is made of. The parts are opened by the caller and
// closed by the caller after Close.
type Config struct {
	Networks *network.Controller
	Log      *slog.Logger
}

// Engine implements API.
type Engine struct {
	cfg Config
}

var _ API = (*Engine)(nil)

// New makes an engine; it has no side effects. Follow it with Recover.
func New(cfg Config) (*Engine, error) {
	return &Engine{cfg: cfg}, nil
}

// Recover takes over what a former engine with the same directories left:
// running containers, half-made and half-removed ones.
func (e *Engine) Recover(ctx context.Context) error { return nil }

// Close ends the engine's goroutines and leaves all containers running.
func (e *Engine) Close() error { return nil }

// Networks is the network controller.
func (e *Engine) Networks() *network.Controller { return e.cfg.Networks }
