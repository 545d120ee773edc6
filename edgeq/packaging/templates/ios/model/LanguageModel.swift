import CoreML
import Foundation
import Tokenizers

/// The language model "@NAME@" in Core ML.
///
///     let model = try await LanguageModel()
///     for try await piece in try await model.answer("Hello") { print(piece, terminator: "") }
///
/// It writes one answer at a time; each begins anew.
public actor LanguageModel {
    /// A way to run the model: a file with a context length, and the memory that it needs.
    ///
    /// The memory was computed when the package was made, and not measured on a device.
    public struct Tier: Sendable {
        /// Identifier, as in `tiers` of `manifest.json`.
        public let name: String
        /// Identifier of the model file; its golden test has the same name.
        public let variant: String
        /// Tokens of prompt and answer together.
        public let context: Int
        /// Memory that the app must be allowed to take.
        public let neededBytes: Int
        /// The parts of the device that Core ML may use.
        public let computeUnits: MLComputeUnits
        let file: String
        let digest: String
        let functions: [(tokens: Int, name: String)]

        /// The first tier for which so much memory is enough; the largest comes first.
        ///
        /// - Parameter availableBytes: nil where the system sets no limit.
        public static func first(of tiers: [Tier], within availableBytes: Int?) throws -> Tier {
            let available = availableBytes ?? Int.max
            if let tier = tiers.first(where: { $0.neededBytes <= available }) { return tier }
            throw ModelError.notEnoughMemory(
                neededBytes: tiers.last?.neededBytes ?? 0, availableBytes: available)
        }
    }

    /// The ways to run the model, from the most memory to the least.
    public static let tiers: [Tier] = [
@TIERS@
    ]

    /// The tier that was chosen.
    public nonisolated let tier: Tier

    /// How tokens are chosen.
    public struct Sampling: Sendable {
        /// 0 always takes the most likely token.
        public var temperature: Float
        /// Only so many of the most likely tokens are considered.
        public var topK: Int

        public init(temperature: Float = 0.8, topK: Int = 40) {
            self.temperature = temperature
            self.topK = topK
        }

        /// Always the most likely token.
        public static let greedy = Sampling(temperature: 0, topK: 1)
    }

    private let tokenizer: any Tokenizer
    private let functions: [(tokens: Int, model: MLModel)]
    private let ends: Set<Int> = [@ENDS@]
    private var state: MLState
    private var position = 0

    /// Loads the model. The first time it is compiled for the device, which takes a while.
    ///
    /// - Parameters:
    ///   - tiers: the tiers to choose from; the first for which there is memory is taken.
    ///   - computeUnits: nil takes those of the tier.
    /// - Throws: `ModelError.notEnoughMemory` if iOS would end the app for each of them.
    public init(tiers: [Tier] = LanguageModel.tiers, computeUnits: MLComputeUnits? = nil)
        async throws
    {
        let tier = try Tier.first(of: tiers, within: ModelFiles.availableBytes())
        self.tier = tier
        let url = try await ModelFiles.compiled(
            tier.file, digest: tier.digest, keep: Self.tiers.map(\.digest))
        var loaded: [(tokens: Int, model: MLModel)] = []
        for (tokens, name) in tier.functions {
            let configuration = MLModelConfiguration()
            configuration.computeUnits = computeUnits ?? tier.computeUnits
            configuration.functionName = name
            let model = try await MLModel.load(contentsOf: url, configuration: configuration)
            loaded.append((tokens, model))
        }
        functions = loaded
        state = loaded[0].model.makeState()
        tokenizer = try await AutoTokenizer.from(modelFolder: try ModelFiles.resource("tokenizer"))
    }

    /// What the model answers to one message, piece by piece as it is written.
    public func answer(_ message: String, sampling: Sampling = Sampling()) throws
        -> AsyncThrowingStream<String, Error>
    {
        write(after: @PROMPT@, sampling)
    }

    /// What the model writes after a text that is given as it is.
    public func continueText(_ text: String, sampling: Sampling = Sampling())
        -> AsyncThrowingStream<String, Error>
    {
        write(after: tokenizer.encode(text: text), sampling)
    }

    /// Token ids of a text.
    func encode(_ text: String, special: Bool) -> [Int] {
        tokenizer.encode(text: text, addSpecialTokens: special)
    }

    private func write(after prompt: [Int], _ sampling: Sampling)
        -> AsyncThrowingStream<String, Error>
    {
        let (stream, continuation) = AsyncThrowingStream<String, Error>.makeStream()
        let task = Task {
            do {
                reset()
                var logits = try feed(prompt)
                var written: [Int] = []
                var shown = ""
                while !Task.isCancelled {
                    let token = Self.choose(logits, sampling)
                    if ends.contains(token) { break }
                    written.append(token)
                    // a character may be spread over several tokens: half of one is not shown
                    let text = tokenizer.decode(tokens: written)
                    if !text.hasSuffix("\u{FFFD}"), text.hasPrefix(shown) {
                        continuation.yield(String(text.dropFirst(shown.count)))
                        shown = text
                    }
                    if position + 1 >= tier.context { break }
                    logits = try feed([token])
                    await Task.yield()
                }
                continuation.finish()
            } catch {
                continuation.finish(throwing: error)
            }
        }
        continuation.onTermination = { _ in task.cancel() }
        return stream
    }

    /// Empties the cache.
    func reset() {
        state = functions[0].model.makeState()
        position = 0
    }

    /// Appends tokens to the cache and gives the logits of what follows.
    func feed(_ tokens: [Int]) throws -> [Float] {
        if tokens.isEmpty || position + tokens.count > tier.context {
            throw ModelError.tooLong(tokens: tokens.count, room: tier.context - position)
        }
        var left = tokens[...]
        var logits: [Float] = []
        while !left.isEmpty {
            let room = tier.context - position
            let usable = functions.filter { $0.tokens <= room }
            let function = usable.filter { $0.tokens >= left.count }.min { $0.tokens < $1.tokens }
                ?? usable.max { $0.tokens < $1.tokens }!
            let count = min(function.tokens, left.count)
            logits = try run(function, Array(left.prefix(count)))
            position += count
            left = left.dropFirst(count)
        }
        return logits
    }

    private func run(_ function: (tokens: Int, model: MLModel), _ tokens: [Int]) throws -> [Float] {
        var padded = [Int32](repeating: 0, count: function.tokens)
        for (at, token) in tokens.enumerated() { padded[at] = Int32(token) }
        var inputs: [String: MLFeatureValue] = [
            "tokens": Self.value(padded, shape: [1, function.tokens]),
            "position": Self.value([Int32(position)], shape: [1]),
        ]
        if function.tokens > 1 {
            inputs["last"] = Self.value([Int32(tokens.count - 1)], shape: [1])
        }
        let given = try MLDictionaryFeatureProvider(dictionary: inputs)
        let result = try function.model.prediction(from: given, using: state)
        guard let logits = result.featureValue(for: "logits")?.multiArrayValue else {
            throw ModelError.missing("logits")
        }
        return MLShapedArray<Float>(converting: logits).scalars
    }

    private static func value(_ numbers: [Int32], shape: [Int]) -> MLFeatureValue {
        MLFeatureValue(multiArray: MLMultiArray(MLShapedArray(scalars: numbers, shape: shape)))
    }

    static func choose(_ logits: [Float], _ sampling: Sampling) -> Int {
        let best = logits.indices.max { logits[$0] < logits[$1] }!
        if sampling.temperature <= 0 || sampling.topK <= 1 { return best }
        let likely = logits.indices.sorted { logits[$0] > logits[$1] }.prefix(sampling.topK)
        let weights = likely.map { exp((logits[$0] - logits[best]) / sampling.temperature) }
        var chance = Float.random(in: 0..<1) * weights.reduce(0, +)
        for (token, weight) in zip(likely, weights) {
            chance -= weight
            if chance < 0 { return token }
        }
        return best
    }
}
