import XCTest

@testable import @MODULE@

/// The model computes on this device what it did when it was packaged, and the tokenizer gives the
/// same token ids.
final class GoldenTests: XCTestCase {
    private struct Prompts: Decodable {
        struct Prompt: Decodable {
            let id: String
            let text: String?
            let rendered: String?
            let ids: [Int]
            let cut: Bool
        }
        let prompts: [Prompt]
    }

    private struct Golden: Decodable {
        struct Allowed: Decodable {
            let logits_rms: Float
            let tie: Float
        }
        struct Result: Decodable {
            let id: String
            let tokens: [Int]
            let logits: [[String: Float]]
        }
        let allowed: Allowed
        let results: [Result]
    }

    private func golden<T: Decodable>(_ name: String, as type: T.Type) throws -> T {
        let folder = try XCTUnwrap(Bundle.module.url(forResource: "golden", withExtension: nil))
        return try JSONDecoder().decode(type, from: Data(contentsOf: folder.appending(path: name)))
    }

    func testTokenizerGivesTheGoldenIds() async throws {
        let model = try await LanguageModel()
        for prompt in try golden("prompts.json", as: Prompts.self).prompts where !prompt.cut {
            let text = try XCTUnwrap(prompt.rendered ?? prompt.text)
            let ids = await model.encode(text, special: prompt.rendered == nil)
            XCTAssertEqual(ids, prompt.ids, "prompt \(prompt.id)")
        }
    }

    func testLogitsAndGreedyTokensAreTheGoldenOnes() async throws {
        var tested: Set<String> = []
        for tier in LanguageModel.tiers where !tested.contains(tier.variant) {
            do {
                try await compare(try await LanguageModel(tiers: [tier]))
            } catch ModelError.notEnoughMemory {
                continue  // there is no memory for it on this device
            }
            tested.insert(tier.variant)
        }
        XCTAssertFalse(tested.isEmpty, "there is no memory for any tier")
    }

    private func compare(_ model: LanguageModel) async throws {
        let known = try golden("\(model.tier.variant).json", as: Golden.self)
        let prompts = try golden("prompts.json", as: Prompts.self).prompts
        for (prompt, result) in zip(prompts, known.results) {
            XCTAssertEqual(prompt.id, result.id)
            await model.reset()
            var logits = try await model.feed(prompt.ids)
            var squares: Float = 0
            var count: Float = 0
            for (step, token) in result.tokens.enumerated() {
                for (id, expected) in result.logits[step] {
                    let difference = logits[try XCTUnwrap(Int(id))] - expected
                    squares += difference * difference
                    count += 1
                }
                let best = LanguageModel.choose(logits, .greedy)
                XCTAssertLessThanOrEqual(
                    logits[best] - logits[token], known.allowed.tie,
                    "\(model.tier.name), prompt \(prompt.id), token \(step + 1)")
                if step + 1 < result.tokens.count {
                    logits = try await model.feed([token])
                }
            }
            XCTAssertLessThanOrEqual(
                (squares / count).squareRoot(), known.allowed.logits_rms,
                "\(model.tier.name), prompt \(prompt.id)")
        }
    }
}
